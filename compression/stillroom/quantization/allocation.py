"""Mixed bits: how many each layer gets, so that a budget of bytes buys the least loss."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stillroom.errors import NotFiniteError, RecipeError
from stillroom.quantization.knapsack import Item, select, undominated
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import WORD, values_per_unit


@dataclass(frozen=True)
class LayerChoice:
    """How a layer is quantized."""

    bits: int
    group_size: int  # columns that share a scale; -1: all of a row


@dataclass(frozen=True)
class MeasuredChoice:
    """A choice for tied layers, and what it takes and costs while all others are as they were."""

    choice: LayerChoice
    size_bytes: int  # of the packed layers together
    cost: float  # what was measured, such as the KL divergence in nats per token


@dataclass(frozen=True)
class ModuleChoices:
    """Layers that get the same choice, and the choices there are."""

    layers: tuple[str, ...]  # dotted names
    options: tuple[MeasuredChoice, ...]


@dataclass(frozen=True)
class Allocation:
    """One choice for every layer."""

    layers: dict[str, LayerChoice]
    picks: tuple[int, ...]  # index of the option of each ModuleChoices
    size_bytes: int
    cost: float  # the sum of the measured costs, as if they were independent
    gap: float  # cost less a lower bound of it within the budget; 0: no better sum is possible


@dataclass(frozen=True)
class Repair:
    """An allocation after swaps that were judged by measuring all layers together."""

    allocation: Allocation
    joint_before: float
    joint_after: float
    measurements: int
    swaps: int  # how many of those measured were kept

    @property
    def excess(self) -> float:
        """How far the joint measure lies above the sum of the single ones."""
        return self.joint_after - self.allocation.cost


def packed_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Return the bytes that a GPTQ checkpoint takes for a layer, without its bias.

    They are its integers and zero points in 32-bit words, fp16 scales, and a 32-bit group index
    for each column.

    Raises:
        RecipeError: the rows, columns or groups do not come out even.
    """
    unit = values_per_unit(bits)
    group = in_features if group_size == -1 else group_size
    if in_features % unit or out_features % unit or group < 1 or in_features % group:
        raise RecipeError(
            f"expected features in multiples of {unit} at {bits} bits and groups that divide "
            f"in_features: got {out_features} x {in_features} in groups of {group_size}; "
            f"use other bits or groups for this layer"
        )
    groups = in_features // group
    words = in_features * out_features * bits // WORD + groups * out_features * bits // WORD
    return 4 * words + 2 * groups * out_features + 4 * in_features


def allocate(choices: Sequence[ModuleChoices], budget_bytes: int) -> Allocation:
    """Return the choices with the least sum of costs whose packed layers fit in the budget.

    Tied layers get one choice. Among equal sums the fewer bytes win, so that a budget above the
    largest choices gives those that cost least.

    Raises:
        RecipeError: not even the smallest choices fit, or a group of layers has no choice.
        NotFiniteError: a cost is NaN or infinite.
    """
    _check(choices)
    smallest = sum(min(each.size_bytes for each in group.options) for group in choices)
    if budget_bytes < smallest:
        raise RecipeError(
            f"the budget must hold every layer at its smallest choice: that takes {smallest} "
            f"bytes, and the budget is {budget_bytes}; raise it, or offer fewer bits or larger "
            f"groups"
        )
    items = [[Item(each.size_bytes, each.cost) for each in group.options] for group in choices]
    found = select(items, budget_bytes)
    return _allocation(choices, found.picks, found.cost - found.gap)


def repair(
    choices: Sequence[ModuleChoices],
    start: Allocation,
    budget_bytes: int,
    measure: Callable[[Allocation], float],
    *,
    trials: int = 16,
) -> Repair:
    """Return the allocation with steps swapped until measuring it agrees with the sum of costs.

    `measure` gives the cost of an allocation as a whole. A `start` over the budget gives way to the
    best sum within it. Then, while the joint measure is above the sum, one group is raised by a
    step and, where the room does not suffice, another lowered by one, in the order of how much the
    sum saves for what it pays; a swap that lowers the joint measure is kept, and the search goes on
    from it. At most `trials` swaps are measured.

    Raises:
        RecipeError: not even the smallest choices fit.
        NotFiniteError: a measure is NaN or infinite.
    """
    best = allocate(choices, budget_bytes)
    lower = best.cost - best.gap
    now = start if start.size_bytes <= budget_bytes else best
    joint = before = _finite(measure(now), "the joint measure")
    seen = {now.picks}
    swaps = 0
    while joint > now.cost and len(seen) <= trials:
        untried = (picks for picks in _swaps(choices, now, budget_bytes) if picks not in seen)
        picks = next(untried, None)
        if picks is None:
            break
        seen.add(picks)
        candidate = _allocation(choices, picks, lower)
        measured = _finite(measure(candidate), "the joint measure")
        if measured < joint:
            now, joint, swaps = candidate, measured, swaps + 1
    return Repair(now, before, joint, len(seen), swaps)


def layer_options(
    layers: Mapping[str, LayerChoice], options: QuantizationOptions
) -> dict[str, QuantizationOptions]:
    """Return the options of each layer: `options` but for bits and group size."""
    return {name: with_choice(options, choice) for name, choice in layers.items()}


def with_choice(options: QuantizationOptions, choice: LayerChoice) -> QuantizationOptions:
    """Return the options with the bits and the group size of a choice."""
    return replace(options, bits=choice.bits, group_size=choice.group_size)  # type: ignore[arg-type]


def dynamic_section(
    layers: Mapping[str, LayerChoice], default: LayerChoice, skipped: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """Return gptqmodel's `dynamic` section of quantization_config for a checkpoint.

    Its keys are regular expressions, of which the first that matches a layer's name counts: "+:"
    gives what differs from `default`, the section's own bits and group_size, and "-:" says that a
    layer is not quantized.
    """
    section: dict[str, dict[str, int]] = {}
    for name in skipped:
        section[f"-:^{re.escape(name)}$"] = {}
    for name, choice in layers.items():
        if choice != default:
            key = f"+:^{re.escape(name)}$"
            section[key] = {"bits": choice.bits, "group_size": choice.group_size}
    return section


def _check(choices: Sequence[ModuleChoices]) -> None:
    named = Counter(name for group in choices for name in group.layers)
    twice = [name for name, count in named.items() if count > 1]
    if twice or not named:
        raise RecipeError(
            f"expected each layer in one group of choices: "
            f"{twice[0] + ' is in two' if twice else 'there is none'}; list every layer once"
        )
    for group in choices:
        if not group.options:
            raise RecipeError(f"{group.layers[0]} has no choice; offer bits and groups that fit it")
        for each in group.options:
            _finite(each.cost, f"the cost of {group.layers[0]} at {each.choice.bits} bits")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise NotFiniteError(f"{what} must be a finite number: {value} came; check the model")
    return value


def _allocation(choices: Sequence[ModuleChoices], picks: Sequence[int], lower: float) -> Allocation:
    """Return the allocation of these picks; `lower` is a bound of the sum of costs."""
    cost = sum(group.options[pick].cost for group, pick in zip(choices, picks, strict=True))
    chosen = [group.options[pick] for group, pick in zip(choices, picks, strict=True)]
    return Allocation(
        layers={
            name: each.choice
            for group, each in zip(choices, chosen, strict=True)
            for name in group.layers
        },
        picks=tuple(picks),
        size_bytes=sum(each.size_bytes for each in chosen),
        cost=cost,
        gap=max(cost - lower, 0.0),
    )


@dataclass(frozen=True)
class _Step:
    """A group's change to its next larger or smaller option."""

    group: int
    pick: int
    size: int  # bytes more; negative where it shrinks
    cost: float  # cost more; negative where it grows


def _steps(choices: Sequence[ModuleChoices], picks: Sequence[int], by: int) -> list[_Step]:
    """Return each group's step to the next undominated option, larger or smaller by sign."""
    steps = []
    for i, (group, pick) in enumerate(zip(choices, picks, strict=True)):
        items = [Item(each.size_bytes, each.cost) for each in group.options]
        now = items[pick]
        beyond = [j for j in undominated(items) if (items[j].size - now.size) * by > 0]
        if beyond:
            to = beyond[0] if by > 0 else beyond[-1]
            steps.append(_Step(i, to, items[to].size - now.size, items[to].cost - now.cost))
    return steps


def _swaps(
    choices: Sequence[ModuleChoices], now: Allocation, budget: int
) -> Iterator[tuple[int, ...]]:
    """Yield the picks one swap away that fit, those that save most for what they pay first.

    A swap raises one group and lowers at most one other.
    """
    room = budget - now.size_bytes
    lowered = _steps(choices, now.picks, -1)
    pairs: list[tuple[_Step, _Step | None]] = []
    for up in _steps(choices, now.picks, 1):
        if up.size <= room:
            pairs.append((up, None))
        else:
            fits = (d for d in lowered if d.group != up.group and up.size + d.size <= room)
            pairs += [(up, down) for down in fits]
    for up, down in sorted(pairs, key=lambda pair: -_saved_for_paid(*pair)):
        picks = list(now.picks)
        picks[up.group] = up.pick
        if down is not None:
            picks[down.group] = down.pick
        yield tuple(picks)


def _saved_for_paid(up: _Step, down: _Step | None) -> float:
    return math.inf if down is None or down.cost <= 0 else -up.cost / down.cost
