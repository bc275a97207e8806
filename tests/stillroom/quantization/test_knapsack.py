import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.quantization import knapsack
from stillroom.quantization.knapsack import Item, select, undominated

ITEMS = st.builds(Item, st.integers(0, 12), st.integers(-3, 12).map(float))
REAL_ITEMS = st.builds(Item, st.integers(1, 10**6), st.floats(0, 10, allow_subnormal=False))


def _brute_force(groups, budget):
    """Return the least (cost, size) over all selections within the budget."""
    totals = (
        (sum(item.cost for item in chosen), sum(item.size for item in chosen))
        for chosen in itertools.product(*groups)
    )
    return min(total for total in totals if total[1] <= budget)


def _smallest(groups):
    return sum(min(item.size for item in items) for items in groups)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.lists(ITEMS, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 40)
)
def test_whole_numbers_give_what_brute_force_gives(groups, room):
    budget = _smallest(groups) + room
    found = select(groups, budget)
    assert (found.cost, found.size) == _brute_force(groups, budget)
    assert found.size <= budget
    assert found.gap == 0
    chosen = [items[pick] for items, pick in zip(groups, found.picks, strict=True)]
    assert sum(item.size for item in chosen) == found.size
    assert sum(item.cost for item in chosen) == found.cost


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(REAL_ITEMS, min_size=1, max_size=5), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_real_numbers_give_what_brute_force_gives(groups, share):
    largest = sum(max(item.size for item in items) for items in groups)
    smallest = _smallest(groups)
    budget = smallest + int(share * (largest - smallest))
    found = select(groups, budget)
    assert found.cost == pytest.approx(_brute_force(groups, budget)[0], rel=1e-12, abs=1e-12)
    assert found.size <= budget


def test_undominated_items_get_larger_and_cheaper():
    items = [Item(5, 2.0), Item(3, 4.0), Item(4, 4.0), Item(9, 2.0), Item(8, 1.0), Item(3, 5.0)]
    assert undominated(items) == [1, 0, 4]


def _model(blocks, seed):
    """Return groups like those of a model: costs that fall fourfold with each bit."""
    generator = random.Random(seed)
    groups = []
    for _ in range(blocks):
        for weights in (2**20, 2**19, 2**21, 2**20):
            scale = weights * generator.lognormvariate(0, 1)
            groups.append(
                [
                    Item(
                        weights * bits // 8 + weights // group * 3,
                        scale * 4.0**-bits * (1 + group / 256) * generator.uniform(0.9, 1.1),
                    )
                    for bits in (2, 3, 4, 8)
                    for group in (32, 64, 128)
                ]
            )
    return groups


@pytest.mark.parametrize("share", [0.05, 0.2, 0.33, 0.8])
def test_a_model_of_100_blocks_takes_seconds_and_is_solved_exactly(share):
    groups = _model(100, seed=1)
    largest = sum(max(item.size for item in items) for items in groups)
    smallest = _smallest(groups)
    start = time.process_time()
    found = select(groups, smallest + int(share * (largest - smallest)))
    assert time.process_time() - start < 10
    assert found.gap == 0


def test_a_thinned_search_reports_how_far_from_the_optimum_it_can_be(monkeypatch):
    groups = _model(3, seed=2)
    budget = int(1.5 * _smallest(groups))
    exact = select(groups, budget)
    monkeypatch.setattr(knapsack, "LARGEST_FRONT", 2)
    thinned = select(groups, budget)
    assert thinned.size <= budget
    assert exact.cost <= thinned.cost <= exact.cost + thinned.gap
