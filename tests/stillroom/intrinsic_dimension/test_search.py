import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.intrinsic_dimension.search import (
    ModelSize,
    Search,
    Trial,
    conclude,
    isotonic,
    next_trials,
)

SIZE = ModelSize(parameters=1_000_000, lora_parameters_a_rank=300)


def run(search, score):
    """Walk a search whose trials score as `score(dimension, seed)` says; return rounds and end."""
    finished, rounds = {}, []
    while trials := next_trials(search, finished):
        rounds.append(trials)
        assert not set(trials) & set(finished)
        finished |= {trial: score(trial.dimension, trial.seed) for trial in trials}
    return rounds, conclude(search, finished, SIZE), finished


def smooth(true_d90, full=0.8):
    """Rises with log d through 0.9 · full at `true_d90`; linear in log d, so that it is exact."""

    def score(dimension, seed):
        if dimension is None:
            return full
        slope = 0.05 * math.log(dimension / true_d90)
        return full * min(0.9 + slope, 1.0)

    return score


@pytest.mark.parametrize("true_d90", [40.0, 333.0, 5000.0])
def test_a_known_dimension_is_found(true_d90: float) -> None:
    search = Search(tolerance=1.1)
    rounds, found, finished = run(search, smooth(true_d90))
    assert found.dimension == pytest.approx(true_d90, rel=1e-6)
    assert found.interval == (pytest.approx(true_d90), pytest.approx(true_d90))
    assert found.lora_rank == math.ceil(true_d90 / 300)
    assert found.full == pytest.approx(0.8)
    assert found.reached
    assert not found.lowest
    assert found.trials == len(finished)
    # The grid and all parameters at once, then a dimension at a time.
    assert len(rounds[0]) == (6 + 1) * 3
    assert all(len(trials) == 3 for trials in rounds[1:])
    brackets = [point.dimension for point in found.curve]
    low = max(d for d in brackets if d < true_d90)
    high = min(d for d in brackets if d >= true_d90)
    assert high / low <= 1.1


def test_bisection_halves_the_logarithm() -> None:
    search = Search(min_dimension=16, max_dimension=256, grid_points=2, tolerance=1.5)
    rounds, _, _ = run(search, smooth(100.0))
    assert [trials[0].dimension for trials in rounds[1:]] == [64, 128, 91]


def test_what_is_never_reached_is_said_so() -> None:
    rounds, found, _ = run(Search(), lambda dimension, seed: 0.8 if dimension is None else 0.5)
    assert len(rounds) == 1
    assert found.dimension is None
    assert found.lora_rank is None
    assert not found.reached
    assert found.interval == (None, None)
    assert found.sentence() == "d90: not reached with up to 16384 dimensions"
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["reached"] is False


def test_what_the_least_dimension_reaches_is_a_bound() -> None:
    rounds, found, _ = run(Search(), lambda dimension, seed: 0.8)
    assert len(rounds) == 1
    assert found.lowest
    assert found.dimension == 16
    assert found.sentence().startswith("d90: at most 16 of 1000000")


def test_nats_count_from_the_untrained_base() -> None:
    def score(dimension, seed):
        if dimension is None:
            return -2.0
        if dimension == 0:
            return -4.0
        return -4.0 + 2.0 * (0.9 + 0.1 * math.log2(dimension / 512))

    rounds, found, _ = run(Search(from_untrained=True, max_dimension=700), score)
    assert Trial(0, 0) in rounds[0]
    assert found.dimension == pytest.approx(512)
    assert found.untrained == -4.0


def test_a_full_fine_tuning_that_gains_nothing_is_not_reached() -> None:
    _, found, _ = run(Search(from_untrained=True), lambda dimension, seed: -3.0)
    assert found.dimension is None
    assert "full fine-tuning gains nothing: a mean score of -3 from -3" in found.sentence()


def test_noise_widens_the_interval_and_ends() -> None:
    def noisy(spread):
        chance = random.Random(1)
        draws = {}

        def score(dimension, seed):
            if (dimension, seed) not in draws:
                draws[dimension, seed] = chance.gauss(0, spread)
            return smooth(500.0)(dimension, seed) + draws[dimension, seed]

        return run(Search(seeds=tuple(range(5))), score)[1]

    little, much = noisy(0.002), noisy(0.02)
    for found in (little, much):
        low, high = found.interval
        assert low is not None
        assert found.dimension is not None
        assert low <= found.dimension <= (high or math.inf)
    assert 400 < little.dimension < 625
    width = [math.log((f.interval[1] or 1e9) / f.interval[0]) for f in (little, much)]
    assert width[0] < width[1]


def test_the_bootstrap_is_seeded() -> None:
    chance = random.Random(0)
    _, found, finished = run(
        Search(), lambda d, seed: smooth(500.0)(d, seed) + chance.gauss(0, 0.02)
    )
    assert conclude(Search(), finished, SIZE) == found


def test_a_search_goes_on_from_what_is_finished() -> None:
    rounds, found, finished = run(Search(), smooth(333.0))
    partly = {trial: finished[trial] for trial in rounds[0][:5]}
    assert next_trials(Search(), partly) == rounds[0][5:]
    partly = {trial: finished[trial] for trials in rounds[:2] for trial in trials}
    assert next_trials(Search(), partly) == rounds[2]
    assert conclude(Search(), finished, SIZE) == found
    # An unfinished dimension is no point of the curve.
    partly[Trial(100, 0)] = 0.7
    assert 100 not in [point.dimension for point in conclude(Search(), partly, SIZE).curve]


def test_the_grid_is_geometric() -> None:
    assert Search(min_dimension=16, max_dimension=16384, grid_points=6).grid() == [
        16, 64, 256, 1024, 4096, 16384,
    ]  # fmt: skip
    assert Search(min_dimension=2, max_dimension=3, grid_points=9).grid() == [2, 3]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=6))
def test_pooling_equals_the_best_partition_by_brute_force(values: list[int]) -> None:
    # The fit is constant on blocks of neighbours; the best non-decreasing one of all partitions.
    best, least = None, math.inf
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        blocks = [[values[0]]]
        for value, cut in zip(values[1:], cuts, strict=True):
            if cut:
                blocks.append([value])
            else:
                blocks[-1].append(value)
        means = [sum(block) / len(block) for block in blocks]
        if any(a > b for a, b in itertools.pairwise(means)):
            continue
        fit = [mean for mean, block in zip(means, blocks, strict=True) for _ in block]
        error = sum((f - v) ** 2 for f, v in zip(fit, values, strict=True))
        if error < least - 1e-12:
            best, least = fit, error
    assert isotonic(values) == pytest.approx(best)
