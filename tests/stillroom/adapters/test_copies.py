import copy
import inspect
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillroom.adapters.copies import FullCopy, TopLayersCopy
from stillroom.adapters.lora import LoraAdapter
from stillroom.adapters.options import LoraOptions, PromptOptions, TopLayersOptions
from stillroom.adapters.places import adaptable_blocks, is_quantized
from stillroom.adapters.prompts import PromptAdapter
from stillroom.errors import RecipeError
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.modes import recomputing
from tests.stillroom.adapters.prompted import BASES, BOTH_HALVES, ROWS, call, frozen, padded

DENSE = [kind for kind in BASES if kind != "quantized"]
MAKE = {"top": lambda base: TopLayersCopy(base, TopLayersOptions(1)), "full": FullCopy}


@torch.no_grad()
def logits(base):
    return call(base, *padded(ROWS, "right")).logits


def train(base, part, steps=8):
    optimizer = torch.optim.Adam(part.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        found = call(base, *padded(ROWS, "right")).logits
        labels = torch.arange(found.shape[:-1].numel()) % 3
        loss = cross_entropy(found.flatten(0, -2).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("kind", DENSE)
def test_fresh_copy_equals_the_base_and_training_leaves_the_base(kind, method):
    base = frozen(kind)
    plain, names = logits(base), list(base.state_dict())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    part = MAKE[method](base)
    part.wear(True)
    assert torch.equal(logits(base), plain)
    losses = train(base, part)
    assert losses[-1] < losses[0]
    trained = logits(base)
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert list(base.state_dict()) == names
    for _ in range(2):
        part.wear(False)
        assert torch.equal(logits(base), plain)
        part.wear(True)
        part.wear(True)
        assert torch.equal(logits(base), trained)
    part.detach()
    assert torch.equal(logits(base), plain)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(each.grad is None for each in base.parameters())
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.parametrize("method", MAKE)
def test_copy_of_a_quantized_base_is_dense(method):
    base = frozen("quantized")
    plain = logits(base)
    part = MAKE[method](base)
    assert not is_quantized(part)
    part.wear(True)
    torch.testing.assert_close(logits(base), plain, rtol=1e-4, atol=1e-4)
    losses = train(base, part)
    assert losses[-1] < losses[0]
    part.wear(False)
    assert torch.equal(logits(base), plain)
    layer = adaptable_blocks(base)[1][1].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    own = MAKE[method](base).state_dict()
    name = next(name for name in own if name.endswith("1.mlp.up_proj.weight"))
    assert torch.equal(own[name], layer.dequantize())
    changed = dict(part.named_parameters())[name]
    assert not torch.equal(changed, own[name])


@pytest.mark.parametrize("kind", DENSE)
def test_top_layers_are_the_last_of_the_decoder(kind):
    base = frozen(kind)
    part = TopLayersCopy(base, TopLayersOptions(2))
    blocks = adaptable_blocks(base.get_decoder() if kind in BOTH_HALVES else base)[1]
    last = range(len(blocks) - 2, len(blocks))
    expected = {
        f"copies.{number}.{name}": value
        for number in last
        for name, value in blocks[number].state_dict().items()
    }
    found = part.tensors()
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    mine = {each.data_ptr() for each in found.values()}
    assert not mine & {each.data_ptr() for each in base.state_dict().values()}


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(RecipeError, match="at most 2, which the model has; 3 came"):
        TopLayersCopy(frozen("llama"), TopLayersOptions(3))


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_saved_copy_computes_the_same_on_another_base(kind, method):
    base = frozen(kind)
    part = MAKE[method](base)
    part.wear(True)
    train(base, part)
    expected, saved = logits(base), copy.deepcopy(part.tensors())
    storages = [each.data_ptr() for each in saved.values()]
    assert len(set(storages)) == len(storages)  # tied weights are saved once
    other = frozen(kind)
    loaded = MAKE[method](other)
    loaded.take(saved)
    loaded.wear(True)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_is_by_the_copy(kind, method):
    base = frozen(kind)
    base.generation_config.eos_token_id = None
    part = MAKE[method](base)
    part.wear(True)
    train(base, part, 20)
    ids = torch.tensor([[11, 12, 13, 14]])
    options = {"max_new_tokens": 4, "do_sample": False}
    if method == "full":
        found = part.generate(base, ids, **options)
    else:
        found = base.generate(input_ids=ids, **options)
    written = torch.zeros(1, 1).long() if kind == "t5" else ids
    for _ in range(4):
        inputs = {"input_ids": written}
        if kind == "t5":
            inputs = {"input_ids": ids, "decoder_input_ids": written}
        best = base(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        written = torch.cat([written, best], 1)
    assert torch.equal(found, written)


@pytest.mark.parametrize("kind", ["llama", "quantized"])
def test_top_layers_of_a_half_precision_base_multiply_in_its_dtype(kind):
    base = frozen(kind).bfloat16()
    plain = logits(base)
    part = TopLayersCopy(base, TopLayersOptions(1))
    assert {each.dtype for each in part.parameters()} == {torch.float32}
    part.wear(True)
    found = logits(base)
    assert found.dtype == torch.bfloat16
    if kind == "llama":
        assert torch.equal(found, plain)
    else:
        torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05)
    losses = train(base, part)
    assert losses[-1] < losses[0]
    part.wear(False)
    assert torch.equal(logits(base), plain)


def test_full_copy_of_a_half_precision_base_is_the_same_weights_in_float32():
    base = frozen("llama").bfloat16()
    part = FullCopy(base)
    part.wear(True)
    expected = copy.deepcopy(frozen("llama").bfloat16()).float()
    assert torch.equal(logits(base), logits(expected))


def test_hidden_states_are_those_of_the_copies():
    base = frozen("llama")
    ids, mask = padded(ROWS, "right")
    for make in MAKE.values():
        for first_asked in (True, False):
            if first_asked:
                call(base, ids, mask, output_hidden_states=True)
            part = make(base)
            part.wear(True)
            train(base, part)
            output = call(base, ids, mask, output_hidden_states=True)
            assert len(output.hidden_states) == 3
            own = part.copy if isinstance(part, FullCopy) else base
            torch.testing.assert_close(own.lm_head(output.hidden_states[-1]), output.logits)
            part.detach()
            base = frozen("llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MAKE)
def test_activations_are_made_again_where_the_base_is_told_to(method, dtype):
    base = frozen("llama").to(dtype).train()
    part = MAKE[method](base).train()
    part.wear(True)
    runs, gradients = [], []
    block = adaptable_blocks(part.copy)[1][1] if method == "full" else part.copies["1"]
    block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for wanted in (False, True, False):
        with recomputing(base, wanted=wanted):
            call(base, *padded(ROWS, "right")).logits.float().square().sum().backward()
        gradients.append([each.grad.clone() for each in part.parameters()])
        part.zero_grad()
    assert len(runs) == 1 + 2 + 1
    torch.testing.assert_close(gradients[1], gradients[0])


def test_copies_are_without_the_hooks_of_other_adapters():
    base = frozen("llama")
    parts = [LoraAdapter(base, LoraOptions(), 0), PromptAdapter(base, PromptOptions(4), 0)]
    for make in MAKE.values():
        part = make(base)
        modules = list(part.modules())
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in modules)
        assert not any(isinstance(each, LoraAdapter | PromptAdapter) for each in modules)
    assert all(part._hooks for part in parts)
    assert base._forward_pre_hooks


@pytest.mark.parametrize("method", MAKE)
def test_arguments_of_the_base_are_still_to_be_seen(method):
    base = frozen("llama")
    before = inspect.signature(base.forward)
    part = MAKE[method](base)
    part.wear(True)
    assert inspect.signature(base.forward) == before


def test_a_forward_that_was_replaced_before_comes_back():
    base = frozen("llama")
    base.forward = replaced = partial(base.forward)
    part = FullCopy(base)
    part.wear(True)
    assert base.forward is not replaced
    part.wear(False)
    assert base.forward is replaced
