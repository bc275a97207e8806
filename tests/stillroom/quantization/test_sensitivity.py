import json

import pytest
import torch
from safetensors.torch import load_file

from stillroom.blocks import find_blocks, find_weights
from stillroom.errors import NotFiniteError, RecipeError
from stillroom.quantization.allocation import (
    LayerChoice,
    allocate,
    layer_options,
    packed_bytes,
    repair,
)
from stillroom.quantization.divergence import kl_measure
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sensitivity import (
    gptq_with,
    measure_costs,
    replaced,
    rounding,
    tied_layers,
)
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2
from tests.stillroom.tiny_mixtures import tiny_mixtral

OFFERS = [LayerChoice(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64)]
OPTIONS = QuantizationOptions(damping=0.05)


def _weights(model):
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{i}.{name}": weight
        for i, block in enumerate(blocks)
        for name, weight in find_weights(block).items()
    }


def _tied(model):
    data = token_rows(1)
    return tied_layers(model, list(_weights(model)), data.input_ids, data.attention_mask)


def _last(groups):
    return [[name.split(".")[-1] for name in group] for group in groups]


def test_layers_that_share_their_input_are_tied():
    groups = _tied(tiny_llama())
    one_block = [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert _last(groups) == 2 * one_block
    assert groups[4][0] == "model.layers.1.self_attn.q_proj"
    assert _last(_tied(tiny_gpt2()))[:4] == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]
    assert _last(_tied(tiny_bert_classifier()))[0] == ["query", "key", "value"]


def test_an_experts_gate_and_up_projection_are_tied():
    groups = _last(_tied(tiny_mixtral()))
    assert groups.count(["gate_proj", "up_proj"]) == 4 * 3  # blocks, experts
    assert groups.count(["down_proj"]) == 4 * 3


def test_a_layer_that_is_not_called_stands_alone():
    model = tiny_llama()
    model.model.layers[0].mlp.spare = torch.nn.Linear(32, 32)
    model.model.layers[1].mlp.spare = torch.nn.Linear(32, 32)
    assert _last(_tied(model)).count(["spare"]) == 2


def _costs(model, offers=OFFERS, quantize=None):
    measure = kl_measure(model, token_rows())
    quantize = quantize or rounding(OPTIONS)
    return list(measure_costs(_weights(model), _tied(model), offers, measure, quantize))


def test_costs_fall_with_bits_bytes_are_exact_and_the_model_stays_as_it_was():
    model = tiny_llama(hidden=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    costs = _costs(model)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert [group.layers for group in costs] == _tied(model)
    for group in costs:
        assert [each.choice for each in group.options] == OFFERS
        by_bits = [each.cost for each in group.options if each.choice.group_size == 64]
        assert by_bits == sorted(by_bits, reverse=True)
        assert by_bits[0] > 10 * by_bits[-1] > 0
    down = costs[3].options[2]  # 3 bits in groups of 32
    assert down.size_bytes == packed_bytes(64, 128, 3, 32)
    attention = costs[0].options[0]
    assert attention.size_bytes == packed_bytes(64, 64, 2, 32) + 2 * packed_bytes(32, 64, 2, 32)


def test_a_cost_is_what_replacing_only_this_group_costs():
    model = tiny_llama(hidden=64)
    costs = _costs(model)
    measure = kl_measure(model, token_rows())
    quantize, weights = rounding(OPTIONS), _weights(model)
    for name in costs[5].layers:
        weights[name].write(quantize(name, weights[name].read(), OFFERS[1]))
    assert measure(costs[5].layers) == costs[5].options[1].cost


def test_offers_that_do_not_fit_are_left_out():
    costs = _costs(tiny_llama(hidden=64), [LayerChoice(4, 128), LayerChoice(4, 64)])
    assert [len(group.options) for group in costs] == [1, 1, 1, 2] * 2
    with pytest.raises(RecipeError, match=r"q_proj, and none of 1 does.*48"):
        _costs(tiny_llama(hidden=64), [LayerChoice(4, 48)])


def test_a_loss_that_is_no_number_names_the_layer():
    model = tiny_llama(hidden=64)
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.q_proj at 2 bits"):
        _costs(model, quantize=lambda name, W, choice: W * torch.nan)
    assert torch.isfinite(model.model.layers[0].self_attn.q_proj.weight).all()


def test_layers_are_quantized_again_only_when_their_choice_changes():
    weights, calls = _weights(tiny_llama(hidden=64)), []
    names = list(weights)[:2]

    def quantize(name, W, choice):
        calls.append((name, choice.bits))
        return W * choice.bits

    original = weights[names[0]].read().clone()
    with replaced(weights, quantize) as replace_by:
        replace_by({names[0]: LayerChoice(2, 32), names[1]: LayerChoice(3, 32)})
        replace_by({names[0]: LayerChoice(2, 32), names[1]: LayerChoice(4, 32)})
        assert torch.equal(weights[names[0]].read(), 2 * original)
    assert calls == [(names[0], 2), (names[1], 3), (names[1], 4)]
    assert torch.equal(weights[names[0]].read(), original)


def test_gptq_takes_the_place_of_rounding_where_there_is_a_hessian():
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    X = torch.randn(100, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        8, 64, generator=torch.Generator().manual_seed(2)
    )
    quantize, choice = gptq_with({"a": 2 * X.T @ X / 100}, OPTIONS), LayerChoice(3, 32)
    lost = {name: float(((quantize(name, W, choice) - W) @ X.T).square().sum()) for name in "ab"}
    assert lost["a"] < 0.7 * lost["b"]
    assert torch.equal(quantize("b", W, choice), rounding(OPTIONS)("b", W, choice))


def test_mixed_bits_lose_less_than_one_choice_for_all_of_the_same_bytes():
    model = tiny_llama(hidden=64, layers=3)
    weights, quantize, measure = _weights(model), rounding(OPTIONS), kl_measure(model, token_rows())
    costs = list(measure_costs(weights, _tied(model), OFFERS, measure, quantize))
    uniform = LayerChoice(3, 64)
    budget = sum(packed_bytes(*weight.read().shape, 3, 64) for weight in weights.values())
    start = allocate(costs, budget)
    with replaced(weights, quantize) as replace_by:

        def joint(allocation):
            replace_by(allocation.layers)
            return measure(allocation.layers)

        found = repair(costs, start, budget, joint)
        replace_by(dict.fromkeys(weights, uniform))
        lost = measure(weights)
    assert found.allocation.size_bytes <= budget
    assert len({choice.bits for choice in found.allocation.layers.values()}) > 1
    assert found.joint_after <= found.joint_before
    assert found.joint_after < 0.8 * lost


@torch.no_grad()
def test_an_allocation_becomes_a_checkpoint_of_its_bytes(tmp_path):
    model, data = tiny_llama(hidden=64), token_rows(16)
    weights, costs = _weights(model), _costs(model)
    budget = sum(packed_bytes(*weight.read().shape, 3, 64) for weight in weights.values())
    allocation = allocate(costs, budget)
    options = QuantizationOptions(4, 64, damping=0.05)
    result = quantize_model(
        model, data, options, layer_options=layer_options(allocation.layers, options)
    )
    save_quantized(model, None, result, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    parts = ("qweight", "qzeros", "scales", "g_idx")
    packed = [tensor.nbytes for name, tensor in stored.items() if name.endswith(parts)]
    assert sum(packed) == allocation.size_bytes <= budget
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    differing = [name for name, choice in allocation.layers.items() if choice.bits != 4]
    assert 0 < len(differing) <= len(section["dynamic"])
    loaded = load_quantized(tmp_path, weights="packed")
    for name, choice in allocation.layers.items():
        assert loaded.get_submodule(name).bits == choice.bits
    ids = data.input_ids
    assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
