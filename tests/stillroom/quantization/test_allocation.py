import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import NotFiniteError, RecipeError
from stillroom.quantization.allocation import (
    Allocation,
    LayerChoice,
    MeasuredChoice,
    ModuleChoices,
    allocate,
    dynamic_section,
    layer_options,
    packed_bytes,
    repair,
)
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack
from stillroom.quantization.rounding import round_to_nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 96, -1])
@pytest.mark.parametrize("shape", [(32, 96), (64, 192), (160, 96)])
def test_bytes_are_those_of_the_packed_tensors(bits, group_size, shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    packed = pack(round_to_nearest(W, QuantizationOptions(bits, group_size)).weight)
    stored = sum(tensor.nbytes for tensor in packed.tensors().values())
    assert packed_bytes(*shape, bits, group_size) == stored


@pytest.mark.parametrize("arguments", [(33, 96, 4, 32), (32, 90, 3, 30), (32, 96, 4, 64)])
def test_bytes_of_what_cannot_be_packed_are_refused(arguments):
    with pytest.raises(RecipeError, match="multiples of"):
        packed_bytes(*arguments)


def _choices(*groups):
    """Return groups named a, b, c… of options given as (bits, bytes, cost)."""
    return [
        ModuleChoices(
            (f"{letter}.one", f"{letter}.two"),
            tuple(MeasuredChoice(LayerChoice(bits, 32), size, cost) for bits, size, cost in group),
        )
        for letter, group in zip("abcdef", groups, strict=False)
    ]


CHOICES = _choices(
    [(2, 20, 9.0), (3, 30, 3.0), (4, 40, 1.0)],
    [(2, 20, 2.0), (3, 30, 0.5), (4, 40, 0.25)],
)


@pytest.mark.parametrize(
    ("budget", "bits"),
    [(40, (2, 2)), (50, (3, 2)), (60, (4, 2)), (69, (4, 2)), (70, (4, 3)), (80, (4, 4))],
)
def test_the_budget_buys_the_least_sum(budget, bits):
    found = allocate(CHOICES, budget)
    assert tuple(found.layers[f"{letter}.one"].bits for letter in "ab") == bits
    assert found.size_bytes <= budget
    assert found.gap == 0


def test_tied_layers_get_one_choice():
    found = allocate(CHOICES, 70)
    assert list(found.layers) == ["a.one", "a.two", "b.one", "b.two"]
    assert found.layers["a.one"] == found.layers["a.two"] == LayerChoice(4, 32)
    assert found.picks == (2, 1)
    assert (found.size_bytes, found.cost) == (70, 1.5)


OPTION = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 50), st.integers(0, 50))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 150)
)
def test_no_other_allocation_within_the_budget_costs_less(groups, room):
    choices = _choices(*groups)
    budget = sum(min(size for _, size, _ in group) for group in groups) + room
    found = allocate(choices, budget)
    sums = [
        (sum(cost for _, _, cost in chosen), sum(size for _, size, _ in chosen))
        for chosen in itertools.product(*groups)
    ]
    assert (found.cost, found.size_bytes) == min(each for each in sums if each[1] <= budget)


def test_a_budget_below_the_smallest_says_the_smallest():
    with pytest.raises(RecipeError, match="takes 40 bytes, and the budget is 39"):
        allocate(CHOICES, 39)


def test_a_budget_above_the_largest_gives_the_largest():
    found = allocate(CHOICES, 10**12)
    assert {choice.bits for choice in found.layers.values()} == {4}
    assert found.size_bytes == 80


@pytest.mark.parametrize("cost", [float("nan"), float("inf")])
def test_a_cost_that_is_no_number_is_refused(cost):
    with pytest.raises(NotFiniteError, match=r"a\.one at 2 bits"):
        allocate(_choices([(2, 20, cost)]), 100)


def test_layers_in_two_groups_and_groups_without_a_choice_are_refused():
    with pytest.raises(RecipeError, match=r"a\.one is in two"):
        allocate([*CHOICES, CHOICES[0]], 200)
    with pytest.raises(RecipeError, match=r"a\.one has no choice"):
        allocate(_choices([]), 200)
    with pytest.raises(RecipeError, match="there is none"):
        allocate([], 200)


def _joint(choices, extra):
    """Return a measure: the sum of costs and what `extra` gives for the bits."""

    def measure(allocation):
        letters = [group.layers[0].split(".")[0] for group in choices]
        bits = tuple(allocation.layers[f"{letter}.one"].bits for letter in letters)
        return allocation.cost + extra(bits)

    return measure


def test_what_adds_up_needs_no_repair():
    start = allocate(CHOICES, 70)
    found = repair(CHOICES, start, 70, _joint(CHOICES, lambda bits: 0.0))
    assert found.allocation == start
    assert (found.measurements, found.swaps) == (1, 0)
    assert found.excess == 0


def test_a_swap_that_lowers_the_joint_measure_is_kept():
    # Together, 2 bits in b cost far more than alone.
    measure = _joint(CHOICES, lambda bits: 10.0 if bits[1] == 2 else 0.0)
    start = allocate(CHOICES, 60)
    assert start.picks == (2, 0)
    found = repair(CHOICES, start, 60, measure)
    assert found.allocation.picks == (1, 1)
    assert found.allocation.size_bytes <= 60
    assert (found.joint_before, found.joint_after) == (13.0, 3.5)
    assert (found.swaps, found.excess) == (1, 0)
    assert found.allocation.gap == pytest.approx(0.5)  # 3.5 against the best sum, 3.0


def test_a_swap_that_does_not_help_is_not_kept_and_trials_end():
    start = allocate(CHOICES, 60)
    found = repair(CHOICES, start, 60, _joint(CHOICES, lambda bits: 1.0))
    assert found.allocation == start
    assert found.swaps == 0
    assert found.excess == 1
    found = repair(CHOICES, start, 60, _joint(CHOICES, lambda bits: 1.0), trials=0)
    assert found.measurements == 1


def test_a_start_over_the_budget_is_brought_within_it():
    start = allocate(CHOICES, 80)
    found = repair(CHOICES, start, 60, _joint(CHOICES, lambda bits: 0.0))
    assert found.allocation == allocate(CHOICES, 60)
    with pytest.raises(RecipeError, match="takes 40 bytes"):
        repair(CHOICES, start, 39, _joint(CHOICES, lambda bits: 0.0))


def test_a_joint_measure_that_is_no_number_is_refused():
    with pytest.raises(NotFiniteError, match="joint"):
        repair(CHOICES, allocate(CHOICES, 60), 60, lambda _: float("nan"))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 100),
    st.integers(0, 10**6),
)
def test_repair_never_makes_the_joint_measure_worse_nor_leaves_the_budget(groups, room, seed):
    choices = _choices(*groups)
    budget = sum(min(size for _, size, _ in group) for group in groups) + room
    start = allocate(choices, budget)

    def measure(allocation: Allocation) -> float:
        return allocation.cost + hash((allocation.picks, seed)) % 7

    found = repair(choices, start, budget, measure)
    assert found.joint_after == measure(found.allocation) <= found.joint_before == measure(start)
    assert found.allocation.size_bytes <= budget
    assert found.measurements <= 17


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "model.layers.1.x"]


def _looked_up(section, name):
    """Return what gptqmodel and vLLM make of a layer's name: the first match from its start."""
    for pattern, overrides in section.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return overrides
    return None


def test_the_dynamic_section_holds_what_differs_from_the_default():
    layers = {
        NAMES[0]: LayerChoice(3, 64),
        NAMES[1]: LayerChoice(4, 32),
        NAMES[2]: LayerChoice(4, -1),
    }
    section = dynamic_section(layers, LayerChoice(4, 32), skipped=["model.layers.1.mlp.up_proj"])
    assert section == {
        r"-:^model\.layers\.1\.mlp\.up_proj$": {},
        r"+:^model\.layers\.0\.self_attn\.q_proj$": {"bits": 3, "group_size": 64},
        r"+:^model\.layers\.1\.x$": {"bits": 4, "group_size": -1},
    }
    assert _looked_up(section, NAMES[0]) == {"bits": 3, "group_size": 64}
    assert _looked_up(section, NAMES[1]) is None
    assert _looked_up(section, "model.layers.1.mlp.up_proj") is False
    assert _looked_up(section, "model.layers.11.mlp.up_proj") is None
    assert _looked_up(section, "model.layers.0.self_attn.q_proj.adapter") is None


def test_one_choice_for_all_needs_no_dynamic_section():
    assert dynamic_section(dict.fromkeys(NAMES, LayerChoice(4, 32)), LayerChoice(4, 32)) == {}


def test_layers_get_the_options_but_for_bits_and_group_size():
    options = QuantizationOptions(4, 64, symmetric=True, damping=0.2)
    found = layer_options({"a": LayerChoice(3, 32), "b": LayerChoice(8, -1)}, options)
    assert found == {
        "a": QuantizationOptions(3, 32, symmetric=True, damping=0.2),
        "b": QuantizationOptions(8, -1, symmetric=True, damping=0.2),
    }
