"""Every kind of transformer goes through, found from its module tree alone."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from stillroom.blocks import find_stacks, find_weights, weight_at
from stillroom.errors import CorruptedError, StageError
from stillroom.models import load_model, save_model
from stillroom.quantization.capture import BlockCaller, Place, Rows
from stillroom.quantization.choices import warn_of_unseen
from stillroom.quantization.formats.export import check_folder, save_quantized
from stillroom.quantization.inputs import collect
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.quantization.streaming import Stream
from stillroom.streamed import open_streamed
from tests.stillroom.tiny import tiny_tokenizer

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {key: SMALL[key] for key in SMALL if key not in ("num_key_value_heads", "head_dim")}
EXPERTS = SMALL | {"num_experts_per_tok": 2}

# name: (task, class of the config, its values)
DISTILBERT = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
MODELS = {
    "llama": ("causal_lm", tf.LlamaConfig, SMALL),
    "mistral": ("causal_lm", tf.MistralConfig, SMALL),
    "qwen3": ("causal_lm", tf.Qwen3Config, SMALL),
    "gemma3": ("causal_lm", tf.Gemma3TextConfig, SMALL | {"sliding_window": 8}),
    "gpt2": (
        "causal_lm",
        tf.GPT2Config,
        {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "opt": (
        "causal_lm",
        tf.OPTConfig,
        ENCODER | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": (
        "causal_lm",
        tf.BloomConfig,
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt_neox": ("causal_lm", tf.GPTNeoXConfig, ENCODER),
    "phi": ("causal_lm", tf.PhiConfig, ENCODER),
    "bert": ("sequence_classification", tf.BertConfig, ENCODER),
    "roberta": ("sequence_classification", tf.RobertaConfig, ENCODER),
    "distilbert": ("sequence_classification", tf.DistilBertConfig, DISTILBERT),
    "masked bert": ("masked_lm", tf.BertConfig, ENCODER),
    "masked roberta": ("masked_lm", tf.RobertaConfig, ENCODER),
    "masked distilbert": ("masked_lm", tf.DistilBertConfig, DISTILBERT),
    "t5": (
        "seq2seq_lm",
        tf.T5Config,
        {
            "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "longt5": (
        "seq2seq_lm",
        tf.LongT5Config,
        {
            "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "local_radius": 3, "decoder_start_token_id": 0,
        },
    ),
    "deberta with a convolution": (
        "sequence_classification",
        tf.DebertaV2Config,
        ENCODER | {"relative_attention": True, "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "mixtral": ("causal_lm", tf.MixtralConfig, EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "causal_lm",
        tf.Qwen3MoeConfig,
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    ),
}  # fmt: skip
CLASSES = {
    "causal_lm": tf.AutoModelForCausalLM,
    "masked_lm": tf.AutoModelForMaskedLM,
    "sequence_classification": tf.AutoModelForSequenceClassification,
    "seq2seq_lm": tf.AutoModelForSeq2SeqLM,
}
BESIDE_BLOCKS = ("longt5", "deberta with a convolution")
"""Kinds that compute more than the next block's input between two blocks."""


def make(kind):
    task, config, values = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLASSES[task].from_config(config(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
                elif parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def rows(count=16, length=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 64, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[3, 9:] = 0
    return SimpleNamespace(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def logits(model, data):
    more = {}
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": data.input_ids, "decoder_attention_mask": data.attention_mask}
    output = model(input_ids=data.input_ids, attention_mask=data.attention_mask, **more).logits
    return output[data.attention_mask.bool()] if output.dim() == 3 else output


@pytest.mark.parametrize("kind", MODELS)
def test_gptq_loses_less_than_rounding(kind):
    data = rows()
    reference = logits(make(kind), data)
    lost = {}
    for method in ("gptq", "rtn"):
        model = make(kind)
        result = quantize_model(model, data, QuantizationOptions(4, 16, method=method))
        assert result.fallbacks == 0
        lost[method] = float((logits(model, data) - reference).square().sum())
    assert 0 < lost["gptq"] < lost["rtn"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_streamed_model_gives_the_same_folder_as_one_in_memory(kind, tmp_path):
    """Blocks come one at a time from disk, and the folder holds what the run computed."""
    task = MODELS[kind][0]
    save_model(make(kind), tiny_tokenizer(), tmp_path / "full")
    data, options = rows(), QuantizationOptions(4, 16)
    whole = load_model(tmp_path / "full", task=task)
    in_memory = quantize_model(whole, data, options)
    save_quantized(whole, None, in_memory, tmp_path / "in_memory")
    model, blocks = open_streamed(tmp_path / "full", task=task)
    result = quantize_model(model, data, options, blocks=blocks)
    stacks = find_stacks(model)
    assert all(p.is_meta for stack in stacks.values() for p in stack.parameters())
    save_quantized(model, tiny_tokenizer(), result, tmp_path / "streamed", blocks=blocks)
    for name, layer in in_memory.layers.items():
        assert torch.equal(layer.weight.integers, result.layers[name].weight.integers), name
    weights = [*(tmp_path / f for f in ("in_memory", "streamed"))]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in weights)
    assert first == second
    check = check_folder(tmp_path / "streamed", result, task, "cpu")
    assert check.relative < 1e-5
    loaded = load_model(tmp_path / "streamed", task=task)
    torch.testing.assert_close(logits(loaded, data), logits(whole, data), rtol=1e-4, atol=1e-5)


def test_encoder_and_decoder_are_both_quantized():
    model = make("t5")
    result = quantize_model(model, rows(), QuantizationOptions(4, 16))
    assert result.stacks == ("encoder.block", "decoder.block")
    cross = "decoder.block.1.layer.1.EncDecAttention.k"
    assert result.layers[cross].account.method == "gptq"


@pytest.mark.parametrize("kind", BESIDE_BLOCKS)
def test_blocks_see_what_they_see_in_the_model(kind):
    """Also their own padding's mask, and what is done between two blocks."""
    model, data = make(kind), rows()
    stacks = find_stacks(model)
    expected = []
    hooks = [
        block.register_forward_hook(lambda *all: expected.append(all[2]))
        for stack in stacks.values()
        for block in stack
    ]
    ids, mask = data.input_ids, data.attention_mask
    logits(model, data)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), BlockCaller(model, stacks).entered() as caller, TemporaryDirectory() as f:
        parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
        stream = Stream(caller, [Rows(ids[part], mask[part]) for part in parts], Path(f))
        for name, stack in stacks.items():
            assert stream.enter() == name
            for index, block in enumerate(stack):
                place = Place(name, index)
                weights = find_weights(block)
                collect(stream, place, weights, list(weights)[:1], True, set(), None)
                stream.advance(place)
                outputs = expected.pop(0)
                whole = outputs[0] if isinstance(outputs, tuple) else outputs
                for b, part in enumerate(parts):
                    real = mask[part].bool()
                    came = stream.hidden[name].read(b, ids.device)
                    torch.testing.assert_close(came[real], whole[part][real])
            stream.leave(name)


def test_blocks_that_are_called_again_are_refused():
    config = tf.AlbertConfig(**ENCODER, embedding_size=16)
    model = tf.AlbertForSequenceClassification(config).eval()
    with pytest.raises(StageError, match=r"albert_layer_groups\.0 is called more than once"):
        quantize_model(model, rows(), QuantizationOptions(4, 16))


def test_every_expert_is_quantized_on_its_own_tokens():
    model = make("mixtral")
    result = quantize_model(model, rows(), QuantizationOptions(4, 16))
    names = [name for name in result.layers if ".experts." in name]
    assert len(names) == 2 * 4 * 3  # blocks, experts, matrices
    assert all(result.layers[name].account.method == "gptq" for name in names)
    errors = {result.layers[name].account.relative_error for name in names}
    assert len(errors) == len(names)


@pytest.mark.parametrize("skip", ["*.experts.0.*", "*.up_proj"])
@pytest.mark.parametrize("streamed", [True, False])
def test_experts_that_are_skipped_lie_beside_packed_ones(skip, streamed, tmp_path):
    save_model(make("mixtral"), tiny_tokenizer(), tmp_path / "full")
    open_model = open_streamed if streamed else lambda path, task: (load_model(path), None)
    model, blocks = open_model(tmp_path / "full", task="causal_lm")
    data = rows()
    result = quantize_model(model, data, QuantizationOptions(2, 16), blocks=blocks, skip=(skip,))
    save_quantized(model, None, result, tmp_path / "ours", blocks=blocks)
    assert check_folder(tmp_path / "ours", result, "causal_lm", "cpu").relative < 1e-5
    loaded, full = load_model(tmp_path / "ours"), load_model(tmp_path / "full")
    for name, weight in find_weights(full).items():
        came = weight_at(loaded, name).read()
        if name in result.layers:
            expected = result.layers[name].weight.dequantize()
            torch.testing.assert_close(came, expected, rtol=1e-3, atol=1e-3)
            assert not torch.equal(came, weight.read())
        else:
            assert torch.equal(came, weight.read()), name


def test_experts_of_which_a_part_is_missing_are_refused(tmp_path):
    model = make("mixtral")
    result = quantize_model(model, rows(), QuantizationOptions(4, 16, method="rtn"))
    save_quantized(model, None, result, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del state[f"model.layers.1.mlp.experts.2.up_proj.{part}"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    missing = r"missing \['model\.layers\.1\.mlp\.experts\.gate_up_proj'\]"
    with pytest.raises(CorruptedError, match=missing):
        load_model(tmp_path)
    _, blocks = open_streamed(tmp_path, task="causal_lm")
    blocks.load("model.layers.0")
    with pytest.raises(CorruptedError, match=missing):
        blocks.load("model.layers.1")


def test_gate_and_up_of_an_expert_load_from_one_matrix_too(tmp_path):
    """Folders held both of them in one packed layer before."""
    model = make("mixtral")
    result = quantize_model(model, rows(), QuantizationOptions(4, 16, method="rtn"))
    save_quantized(model, None, result, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [key for key in state if ".experts." in key and ".gate_proj." in key]:
        gate, up = state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))
        both = gate if name.endswith("g_idx") else torch.cat([gate, up], dim=1)
        state[name.replace("gate_proj", "gate_up_proj")] = both
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_model(tmp_path), rows()), logits(model, rows()))


def test_an_expert_that_no_token_reaches_is_rounded_and_counted():
    model = make("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3].abs_()
    data = rows()
    result = quantize_model(model, data, QuantizationOptions(4, 16))
    idle = [a for a in result.accounts if a.fell_back]
    assert {a.name.split(".experts.")[1][0] for a in idle} <= {"3"}


def test_weights_in_no_layer_that_can_be_quantized_are_told(caplog):
    """The experts of Llama 4 bear no mark."""
    values = SMALL | {"num_local_experts": 4, "intermediate_size_mlp": 64, "num_experts_per_tok": 1}
    model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**values)).eval()
    quantize_model(model, rows(), QuantizationOptions(4, 8, method="rtn"))
    assert "are not quantized, first model.layers.0.feed_forward.experts.gate_up" in caplog.text


@pytest.mark.parametrize("kind", MODELS)
def test_all_weights_of_the_known_kinds_are_in_layers(kind, caplog):
    warn_of_unseen(find_stacks(make(kind)))
    assert "not quantized" not in caplog.text


def test_conv1d_and_fused_experts_count_as_linears():
    gpt2 = find_weights(make("gpt2").transformer.h[0])
    assert gpt2["attn.c_attn"].shape == (96, 32)
    mixtral = find_weights(make("mixtral").model.layers[0])
    assert mixtral["mlp.experts.3.up_proj"].shape == (64, 32)
    assert mixtral["mlp.experts.0.down_proj"].shape == (32, 64)
