import pytest
import torch
from torch import nn

from stillroom.adapters.bottleneck import Bottleneck, BottleneckAdapter, NormOffset
from stillroom.adapters.options import BottleneckOptions
from stillroom.adapters.sublayers import find_sublayers
from stillroom.errors import RecipeError
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.modes import recomputing
from tests.stillroom.adapters.zoo import (
    KINDS,
    MIXTURES,
    answer,
    build,
    state,
    tiny_deepseek,
    train,
    words,
)
from tests.stillroom.tiny_mixtures import tiny_switch

OPTIONS = BottleneckOptions(width=4)
# How a block's sublayers end, by hand: attentions, then the feed-forward layer.
ENDS = {
    "gpt2": ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"],
    "opt": ["model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"],
    "bloom": ["transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"],
    "gpt_neox": ["gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"],
    "phi": ["model.layers.1.self_attn.dense", "model.layers.1.mlp.fc2"],
    "t5": [
        "decoder.block.1.layer.0.SelfAttention.o",
        "decoder.block.1.layer.1.EncDecAttention.o",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ],
}
for name in ("bert", "roberta"):
    block = f"{name}.encoder.layer.1"
    ENDS[name] = [f"{block}.attention.output.dense", f"{block}.output.dense"]
    ENDS[f"masked {name}"] = ENDS[name]
ENDS["distilbert"] = [
    "distilbert.transformer.layer.1.attention.out_lin",
    "distilbert.transformer.layer.1.ffn.lin2",
]
ENDS["masked distilbert"] = ENDS["distilbert"]
for name in ("llama", "mistral", "qwen3", "gemma3"):
    ENDS[name] = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
for name in MIXTURES:
    ENDS[name] = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp"]
# Norms as wide as the residual stream, in all blocks.
NORMS = dict.fromkeys(KINDS, 4) | {"gemma3": 8, "phi": 2, "t5": 2 * 2 + 2 * 3}


def put_on(model, placement="houlsby", rows=True, **options):
    part = BottleneckAdapter(model, BottleneckOptions(width=4, placement=placement, **options), 3)
    part.wear(rows)
    return part


def disturb(part):
    generator = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_places_are_the_ends_of_the_sublayers(kind, bits):
    model = build(kind, bits)
    found = find_sublayers(model)
    assert [*found[-1].attentions, found[-1].feed_forward] == ENDS[kind]
    assert len(found) == (4 if kind == "t5" else 2)
    both, one = put_on(model), put_on(model, "pfeiffer")
    bottlenecks = [
        [name.replace("/", ".") for name, change in part.changes.items() if _is(change)]
        for part in (both, one)
    ]
    assert bottlenecks[0] == [n for each in found for n in (*each.attentions, each.feed_forward)]
    assert bottlenecks[1] == [each.feed_forward for each in found]
    norms = [change for change in both.changes.values() if isinstance(change, NormOffset)]
    assert len(norms) == NORMS[kind]
    assert not any(isinstance(change, NormOffset) for change in one.changes.values())
    assert not any(hook for layer in model.modules() for hook in _left_over(layer, (both, one)))


def _is(change):
    return isinstance(change, Bottleneck)


def _left_over(layer, parts):
    own = {hook.id for part in parts for hook in part._hooks}
    return (set(layer._forward_hooks) | set(layer._forward_pre_hooks)) - own


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_one_changes_little_and_taken_off_nothing(kind):
    model = build(kind)
    with torch.no_grad():
        expected = answer(model, words())
        part = put_on(model)
        moved = answer(model, words()) - expected
        assert 0 < moved.norm() < 1e-3 * expected.norm()
        disturb(part)
        assert (answer(model, words()) - expected).norm() > 1e-2 * expected.norm()
        part.wear(False)
        assert torch.equal(answer(model, words()), expected)
        part.wear(True)
        part.detach()
        assert torch.equal(answer(model, words()), expected)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_leaves_the_base(kind, placement):
    model = build(kind)
    before = state(model)
    part = put_on(model, placement)
    losses = train(model, part)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_training_on_a_packed_base(kind, bits):
    model = build(kind, bits)
    before = state(model)
    packed = sum(isinstance(module, QuantizedLinear) for module in model.modules())
    assert packed >= 6
    losses = train(model, put_on(model))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_routed(kind):
    model = build(kind)
    with torch.no_grad():
        plain = answer(model, words())
        part = put_on(model)
        disturb(part)
        worn = answer(model, words())
        part.wear(torch.tensor([2, 0]))
        mixed = answer(model, words())
    torch.testing.assert_close(mixed[[0, 2]], worn[[0, 2]], rtol=1e-5, atol=1e-5)
    if kind in MIXTURES:  # an expert's product has the tokens of all rows
        torch.testing.assert_close(mixed[[1, 3]], plain[[1, 3]], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(mixed[[1, 3]], plain[[1, 3]])


def test_two_adapters_in_one_batch():
    model = build("opt")
    first, second = put_on(model, rows=False), put_on(model, "pfeiffer", rows=False)
    for part in (first, second):
        disturb(part)
    alone = []
    with torch.no_grad():
        for part in (first, second):
            part.wear(True)
            alone.append(answer(model, words()))
            part.wear(False)
        first.wear(torch.tensor([0, 1]))
        second.wear(torch.tensor([3]))
        mixed = answer(model, words())
    expected = [alone[0][0], alone[0][1], None, alone[1][3]]
    for row in (0, 1, 3):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["opt", "qwen3_moe"])
def test_gradients_with_activations_made_again(kind):
    gradients = []
    for again in (False, True):
        model = build(kind).train()
        for module in model.modules():
            if hasattr(module, "dropout"):  # OPT draws by functions
                module.dropout = 0.0
        part = put_on(model, rows=torch.tensor([1, 2]))
        disturb(part)
        with recomputing(model, wanted=again):
            answer(model, words()).square().sum().backward()
        gradients.append([p.grad for p in part.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_formula(activation):
    options = BottleneckOptions(width=3, activation=activation)
    each = Bottleneck(5, options, torch.Generator().manual_seed(0))
    disturb(each)
    h = torch.randn((2, 4, 5), generator=torch.Generator().manual_seed(1))
    expected = h.clone()
    act = getattr(nn.functional, activation)
    for row in range(2):
        for token in range(4):
            inner = act(each.D @ h[row, token] + each.b)
            expected[row, token] += each.U @ inner + each.c
    torch.testing.assert_close(each(h), expected)


def test_norms_are_trained_as_if_their_own_weights_were():
    model = build("bert")
    part = put_on(model)
    for change in part.changes.values():
        if _is(change):
            change.U.data.zero_()
        else:
            disturb(change)
    other = build("bert")
    for name, change in part.changes.items():
        if not _is(change):
            norm = other.get_submodule(name.replace("/", "."))
            norm.weight.mul_(1 + change.scale)
            norm.bias.copy_(norm.bias * (1 + change.scale) + change.shift)
    torch.testing.assert_close(answer(model, words()), answer(other, words()))


def test_half_precision_keeps_its_type_and_the_adapter_its_own():
    model = build("llama").to(torch.bfloat16)
    part = put_on(model)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert answer(model, words()).dtype == torch.bfloat16
    part.wear(torch.tensor([1]))
    assert answer(model, words()).dtype == torch.bfloat16


def test_seed_decides_and_global_random_numbers_do_not():
    model = build("llama")
    before = torch.random.get_rng_state()
    parts = [BottleneckAdapter(model, OPTIONS, seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (part.changes["model/layers/0/mlp/down_proj"].D for part in parts)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert float(first.detach().abs().max()) <= 2e-2


def test_building_one_leaves_the_mode_of_a_base_in_training():
    model = build("bert").train()
    model.bert.pooler.eval()
    put_on(model)
    assert model.training
    assert not model.bert.pooler.training


def test_saved_values_come_back():
    model = build("gpt2")
    part, other = put_on(model, rows=False), put_on(model, rows=False)
    disturb(part)
    other.take(part.tensors())
    answers = []
    for each in (part, other):
        each.wear(True)
        answers.append(answer(model, words()))
        each.wear(False)
    assert torch.equal(*answers)


def test_a_shared_expert_is_a_part_of_the_mixture():
    model = tiny_deepseek()  # its router has a softmax, and layers as wide as the stream behind it
    ends = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp"]
    for i, each in enumerate(find_sublayers(model)):
        assert each.attentions == (f"model.layers.{i}.self_attn.o_proj",)
        assert each.feed_forward == ends[i]


def spreading(classifier):
    """Return a router by which each expert runs once, as a dense layer does, on one token."""

    def route(hidden):
        classifier(hidden)
        return torch.eye(3)[None], torch.ones((1, 3, 1)), None

    return route


@pytest.mark.parametrize("spread", [False, True])
def test_experts_that_are_modules_are_refused(spread):
    model = tiny_switch()
    for module in model.modules():
        if spread and hasattr(module, "router"):
            module.router.forward = spreading(module.router.classifier)
    with pytest.raises(RecipeError, match="expert_0"):
        BottleneckAdapter(model, OPTIONS, 0)


def test_model_without_attention_is_refused():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RecipeError, match=r"softmax.*up_proj"):
        BottleneckAdapter(model, OPTIONS, 0)
