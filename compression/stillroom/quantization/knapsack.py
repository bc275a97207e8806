"""The multiple-choice knapsack: one item of each group, the least cost within a budget of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# More partial selections than this are thinned out, and the result may miss the optimum.
LARGEST_FRONT = 100_000


@dataclass(frozen=True)
class Item:
    """What choosing an item takes and costs."""

    size: int  # bytes
    cost: float


@dataclass(frozen=True)
class Selection:
    """The index of the item of each group, and how far from the optimum they can be."""

    picks: tuple[int, ...]
    size: int
    cost: float
    gap: float  # cost less a lower bound of any selection within the budget; 0: it is the optimum


@dataclass(frozen=True)
class _Step:
    """From one item of a group to the next larger on its lower convex hull."""

    ratio: float  # cost saved for each byte
    group: int
    start: int
    end: int
    size: int


def select(groups: Sequence[Sequence[Item]], budget: int) -> Selection:
    """Return the items, one of each group, of the least total cost with a total size in budget.

    The Lagrangian relaxation (a price for each byte) gives a lower bound, and a greedy filling an
    upper one. An item whose regret, its priced cost above its group's least, exceeds the distance
    between them is in no better selection; so is a partial selection whose regrets add up to that.
    What is left is searched exactly, group by group, over sizes and costs that no other partial
    selection beats in both. Sizes are exact: there are no buckets.

    The budget must hold the smallest item of each group. Among equal costs the smaller size wins.
    """
    kept = [undominated(items) for items in groups]
    steps = [step for i, items in enumerate(groups) for step in _hull_steps(i, items, kept[i])]
    steps.sort(key=lambda step: -step.ratio)
    greedy, price = _fill([each[0] for each in kept], groups, steps, budget)
    filled = _total(groups, greedy)
    least = [min(item.cost + price * item.size for item in items) for items in groups]
    lower = sum(least) - price * budget
    # Rounding must not throw the optimum away.
    allowed = max(filled.cost - lower, 0.0) + 1e-9 * (sum(map(abs, least)) + price * budget)
    picks, complete = _search(groups, kept, least, price, budget, allowed)
    searched = filled if picks is None else _total(groups, picks)
    found = min(searched, filled, key=lambda selection: (selection.cost, selection.size))
    gap = 0.0 if complete else max(found.cost - lower, 0.0)
    return Selection(found.picks, found.size, found.cost, gap)


def undominated(items: Sequence[Item]) -> list[int]:
    """Return the indices of the items that no item beats in size and cost, smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: (items[i].size, items[i].cost)):
        if not kept or items[index].cost < items[kept[-1]].cost:
            kept.append(index)
    return kept


def _hull_steps(group: int, items: Sequence[Item], kept: list[int]) -> list[_Step]:
    """Return the steps along the lower convex hull of the undominated items, by falling ratio."""
    steps: list[_Step] = []
    for index in kept[1:]:
        step = _step(group, items, kept[0] if not steps else steps[-1].end, index)
        while steps and step.ratio >= steps[-1].ratio:
            step = _step(group, items, steps.pop().start, index)
        steps.append(step)
    return steps


def _step(group: int, items: Sequence[Item], start: int, end: int) -> _Step:
    size = items[end].size - items[start].size
    return _Step((items[start].cost - items[end].cost) / size, group, start, end, size)


def _fill(
    picks: list[int], groups: Sequence[Sequence[Item]], steps: list[_Step], budget: int
) -> tuple[list[int], float]:
    """Return the picks after every step that fits, best ratio first, and the price of a byte.

    The price is the ratio of the first step that does not fit; 0 where all do.
    """
    room = budget - sum(groups[i][pick].size for i, pick in enumerate(picks))
    price = 0.0
    for step in steps:
        if picks[step.group] == step.start and step.size <= room:
            picks[step.group] = step.end
            room -= step.size
        elif not price:
            price = step.ratio
    return picks, price


def _total(groups: Sequence[Sequence[Item]], picks: Sequence[int]) -> Selection:
    chosen = [items[pick] for items, pick in zip(groups, picks, strict=True)]
    size, cost = sum(item.size for item in chosen), sum(item.cost for item in chosen)
    return Selection(tuple(picks), size, cost, 0.0)


def _search(
    groups: Sequence[Sequence[Item]],
    kept: list[list[int]],
    least: list[float],
    price: float,
    budget: int,
    allowed: float,
) -> tuple[list[int] | None, bool]:
    """Return the best picks whose regrets add up to at most `allowed`, and if none was missed."""
    rest = sum(groups[i][each[0]].size for i, each in enumerate(kept))
    size, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    complete = True
    for i, items in enumerate(groups):
        rest -= items[kept[i][0]].size
        options = [
            j for j in kept[i] if items[j].cost + price * items[j].size - least[i] <= allowed
        ]
        parent = np.tile(np.arange(len(size)), len(options))
        pick = np.repeat(np.array(options, dtype=np.int64), len(size))
        size = np.concatenate([size + items[j].size for j in options])
        cost = np.concatenate([cost + items[j].cost for j in options])
        regret = cost + price * size - sum(least[: i + 1])
        front = _front(size, cost, (size + rest <= budget) & (regret <= allowed))
        if len(front) > LARGEST_FRONT:
            complete = False
            front = front[np.sort(np.argpartition(regret[front], LARGEST_FRONT)[:LARGEST_FRONT])]
        size, cost = size[front], cost[front]
        history.append((parent[front], pick[front]))
    # The front goes from small and dear to large and cheap.
    return (_trace(history, len(size) - 1) if len(size) else None), complete


def _front(
    size: NDArray[np.int64], cost: NDArray[np.float64], usable: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the indices of usable selections that none beats in size and cost, by size."""
    index = np.flatnonzero(usable)
    index = index[np.lexsort((cost[index], size[index]))]
    better = np.ones(len(index), dtype=bool)
    better[1:] = cost[index[1:]] < np.minimum.accumulate(cost[index])[:-1]
    return index[better]


def _trace(history: list[tuple[NDArray[np.int64], NDArray[np.int64]]], last: int) -> list[int]:
    picks: list[int] = []
    for parent, pick in reversed(history):
        picks.append(int(pick[last]))
        last = int(parent[last])
    return picks[::-1]
