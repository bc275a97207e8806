import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from stillroom.blocks import find_blocks, find_linears, find_stacks, find_weights
from stillroom.errors import RecipeError
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama


def _gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize(
    ("model", "name", "linears"),
    [
        (tiny_llama(), "model.layers", 7),
        (tiny_bert_classifier(), "bert.encoder.layer", 6),
        (_gpt2(), "transformer.h", 4),
    ],
    ids=["llama", "bert", "gpt2"],
)
def test_blocks_and_linears_are_found_without_a_table(model, name, linears):
    found, blocks = find_blocks(model)
    assert found == name
    assert len(blocks) == 2
    assert len(find_linears(blocks[0])) == linears


def test_linears_come_in_definition_order():
    _, blocks = find_blocks(tiny_llama())
    assert [name.split(".")[-1] for name in find_linears(blocks[0])] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


def test_a_model_without_blocks_is_refused():
    with pytest.raises(RecipeError, match="Sequential has no such ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(("encoders", "decoders"), [(1, 3), (3, 1), (1, 1)])
def test_an_encoder_or_decoder_of_one_block_is_a_stack(encoders: int, decoders: int) -> None:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=encoders,
        num_decoder_layers=decoders, decoder_start_token_id=0,
    )  # fmt: skip
    sizes = {
        name: len(stack) for name, stack in find_stacks(T5ForConditionalGeneration(config)).items()
    }
    assert sizes == {"encoder.block": encoders, "decoder.block": decoders}


@pytest.mark.parametrize("linear", [nn.Linear(3, 5), Conv1D(5, 3)], ids=["Linear", "Conv1D"])
def test_weights_are_read_and_written_as_out_by_in(linear):
    weight = find_weights(nn.Sequential(linear))["0"]
    assert weight.shape == (5, 3)
    values = torch.arange(15.0).view(5, 3)
    weight.write(values)
    assert torch.equal(weight.read(), values)
    x = torch.ones(1, 3)
    assert torch.allclose(linear(x), values.sum(1) + linear.bias)
