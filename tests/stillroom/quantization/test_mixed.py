from dataclasses import replace

import pytest
import torch

from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import MismatchError, RecipeError
from stillroom.models import load_model
from stillroom.quantization import obq
from stillroom.quantization.allocation import LayerChoice
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.mixed import choose_bits
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.quantization.test_sequential import logits, rows
from tests.stillroom.tiny import tiny_llama

OFFERS = [LayerChoice(bits, 32) for bits in (2, 4, 8)]
OPTIONS = QuantizationOptions(4, 32)


def _bytes(result):
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in result.layers.values()
        for tensor in pack(layer.weight).tensors().values()
    )


@pytest.fixture(scope="module")
def sizes():
    return {
        bits: _bytes(quantize_model(tiny_llama(hidden=64), rows(), QuantizationOptions(bits, 32)))
        for bits in (2, 4, 8)
    }


def test_the_folder_keeps_the_budget_and_loses_less_than_the_fewest_bits(sizes, tmp_path):
    model, before = tiny_llama(hidden=64), tiny_llama(hidden=64).state_dict()
    budget = (sizes[2] + sizes[4]) // 2
    layers, found = choose_bits(model, rows(), OPTIONS, OFFERS, budget)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert len({options.bits for options in layers.values()}) > 1
    for block in (0, 1):
        name = f"model.layers.{block}.self_attn"
        assert len({layers[f"{name}.{part}_proj"].bits for part in "qkv"}) == 1
    reference = logits(tiny_llama(hidden=64), rows())
    mixed = quantize_model(model, rows(), OPTIONS, layer_options=layers)
    assert _bytes(mixed) == found.allocation.size_bytes <= budget
    save_quantized(model, None, mixed, tmp_path)
    loaded = load_model(tmp_path, weights="dense")
    assert torch.equal(logits(loaded, rows()), logits(model, rows()))
    fewest = tiny_llama(hidden=64)
    quantize_model(fewest, rows(), QuantizationOptions(2, 32))
    lost, more = (
        float((logits(each, rows()) - reference).square().sum()) for each in (loaded, fewest)
    )
    assert lost < more


def test_what_was_measured_before_a_crash_is_not_measured_again(sizes, tmp_path):
    def stop_after_two(done, total, unit, note=""):
        asked.append((done, total))
        if done == 3:
            raise KeyboardInterrupt  # the third group is measured, but not kept

    asked: list[tuple[int, int]] = []
    kept, budget = FolderCheckpoints(tmp_path), (sizes[2] + sizes[4]) // 2
    model = tiny_llama(hidden=64)
    expected = choose_bits(model, rows(), OPTIONS, OFFERS, budget)
    with pytest.raises(KeyboardInterrupt):
        choose_bits(
            model, rows(), OPTIONS, OFFERS, budget, checkpoints=kept, progress=stop_after_two
        )
    _, whole = asked.pop()
    asked.clear()
    again = choose_bits(
        model, rows(), OPTIONS, OFFERS, budget, checkpoints=kept,
        progress=lambda done, total, unit, note="": asked.append((done, total)),
    )  # fmt: skip
    assert again == expected
    assert asked[-1] == (whole - 2, whole - 2)
    # Blocks are kept beside them.
    quantize_model(model, rows(), OPTIONS, layer_options=again[0], checkpoints=kept)
    with pytest.raises(MismatchError, match="costs-"):
        choose_bits(model, rows(), OPTIONS, OFFERS[:2], budget, checkpoints=kept)


def test_a_budget_below_the_smallest_names_the_smallest(sizes):
    with pytest.raises(RecipeError, match=str(sizes[2])):
        choose_bits(tiny_llama(hidden=64), rows(), OPTIONS, OFFERS, sizes[2] - 1)


def test_a_budget_above_the_largest_gives_the_largest(sizes):
    layers, _ = choose_bits(tiny_llama(hidden=64), rows(), OPTIONS, OFFERS, 10 * sizes[8])
    assert {options.bits for options in layers.values()} == {8}


def test_skipped_layers_take_nothing_of_the_budget():
    skip = ("*mlp*",)
    four = quantize_model(tiny_llama(hidden=64), rows(), OPTIONS, skip=skip)
    layers, found = choose_bits(
        tiny_llama(hidden=64), rows(), OPTIONS, OFFERS, _bytes(four), skip=skip
    )
    assert layers.keys() == four.layers.keys()
    mixed = quantize_model(tiny_llama(hidden=64), rows(), OPTIONS, layer_options=layers, skip=skip)
    assert _bytes(mixed) == found.allocation.size_bytes <= _bytes(four)


def test_a_layer_that_no_offer_fits_may_be_skipped(tmp_path):
    odd = tiny_llama(hidden=64)
    odd.model.layers[1].mlp.down_proj = torch.nn.Linear(100, 64, bias=False)
    odd.model.layers[1].mlp.gate_proj = torch.nn.Linear(64, 100, bias=False)
    odd.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 100, bias=False)
    kept, budget = FolderCheckpoints(tmp_path), 10**6
    with pytest.raises(RecipeError):
        choose_bits(odd, rows(), OPTIONS, OFFERS, budget)
    layers, _ = choose_bits(
        odd, rows(), OPTIONS, OFFERS, budget, skip=("*1.mlp*",), checkpoints=kept
    )
    assert len(layers) == 11
    with pytest.raises(MismatchError, match="costs-"):
        choose_bits(odd, rows(), OPTIONS, OFFERS, budget, skip=("*.mlp.*",), checkpoints=kept)


def test_a_skip_that_fits_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"skip must fit some .*\*\.attention"):
        choose_bits(tiny_llama(hidden=64), rows(), OPTIONS, OFFERS, 10**6, skip=("*.attention",))


def test_a_layer_too_large_for_obq_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(obq, "LARGEST_WORK", 64 * 64**3)
    model, data, asked = tiny_llama(hidden=64), rows(), []
    options = replace(OPTIONS, method="obq")
    with pytest.raises(RecipeError, match="OBQ takes layers"):
        choose_bits(
            model, data, options, OFFERS, 10**6, progress=lambda done, *_: asked.append(done)
        )
    assert not asked
