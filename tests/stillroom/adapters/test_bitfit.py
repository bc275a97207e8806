import pytest
import torch
from torch import nn

from stillroom.adapters.bitfit import BitFitAdapter, biased_names
from stillroom.errors import RecipeError
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.modes import recomputing
from tests.stillroom.adapters.zoo import KINDS, answer, build, state, train, words

WITHOUT = ("llama", "mistral", "qwen3", "gemma3", "t5", "mixtral", "qwen3_moe")
WITH = [kind for kind in KINDS if kind not in WITHOUT]
# In each of two blocks, and around them, by hand.
COUNTS = {"gpt2": 2 * 6 + 1, "opt": 2 * 8 + 1, "bloom": 2 * 6 + 2, "gpt_neox": 2 * 6 + 1}
COUNTS |= {"phi": 2 * 7 + 1, "bert": 2 * 8 + 2}
COUNTS = dict.fromkeys(WITH, 2 * 8 + 1) | COUNTS


def put_on(model, rows=True):
    part = BitFitAdapter(model)
    part.wear(rows)
    return part


def disturb(part):
    generator = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", WITH)
def test_every_bias_of_the_backbone_has_an_offset(kind, bits):
    model = build(kind, bits)
    part = put_on(model)
    assert len(list(part.parameters())) == COUNTS[kind]
    found = {name for name, _ in state(model).items() if name.endswith(".bias")}
    backbone = f"{model.base_model_prefix}."
    assert {f"{name}.bias" for name in biased_names(model)} == {
        name for name in found if name.startswith(backbone)
    }


@pytest.mark.parametrize("kind", WITH)
def test_fresh_one_changes_nothing_and_offsets_are_biases(kind):
    model, other = build(kind), build(kind)
    with torch.no_grad():
        plain = answer(model, words())
        part = put_on(model)
        assert torch.equal(answer(model, words()), plain)
        disturb(part)
        for name, offset in part.offsets.items():
            other.get_submodule(name.replace("/", ".")).bias.add_(offset)
        expected = answer(other, words())
        assert not torch.allclose(expected, plain, atol=1e-2)
        torch.testing.assert_close(answer(model, words()), expected, rtol=1e-4, atol=1e-4)
        part.detach()
        assert torch.equal(answer(model, words()), plain)


@pytest.mark.parametrize("kind", WITH)
def test_training_lowers_the_loss_and_leaves_the_base(kind):
    model = build(kind)
    before = state(model)
    part = put_on(model)
    losses = train(model, part)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in part.parameters())
    # A common change of all keys changes no softmax: the bias of keys alone has no gradient.
    moved = sum(bool(parameter.abs().sum() > 0) for parameter in part.parameters())
    assert moved >= COUNTS[kind] - 2
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt"])
def test_training_on_a_packed_base(kind, bits):
    model = build(kind, bits)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    before = state(model)
    losses = train(model, put_on(model))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("kind", WITH)
def test_rows_are_routed(kind, length):
    model, ids = build(kind), words(4, length)
    with torch.no_grad():
        plain = answer(model, ids)
        part = put_on(model)
        disturb(part)
        worn = answer(model, ids)
        part.wear(torch.tensor([2, 0]))
        mixed = answer(model, ids)
    torch.testing.assert_close(mixed[[0, 2]], worn[[0, 2]], rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_gradients_with_activations_made_again():
    gradients = []
    for again in (False, True):
        model = build("gpt2").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        part = put_on(model, torch.tensor([1, 2]))
        with recomputing(model, wanted=again):
            answer(model, words()).square().sum().backward()
        gradients.append([p.grad for p in part.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("rows", [True, torch.tensor([1])])
def test_half_precision_keeps_its_type_and_the_offsets_their_own(rows):
    model = build("opt").to(torch.bfloat16)
    part = put_on(model, rows)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert answer(model, words()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", WITHOUT)
def test_base_without_biases_is_refused(kind):
    with pytest.raises(RecipeError, match="has none"):
        BitFitAdapter(build(kind))
