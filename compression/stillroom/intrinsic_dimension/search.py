"""Which trials a search for the intrinsic dimension needs next, and what they come to.

Nothing is trained here: from finished trials follows what is still to do, so that a search that was
interrupted goes on where it stopped.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

BOOTSTRAPS = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Trial:
    """One training: in a subspace of `dimension`, or with None of all parameters.

    Dimension 0 is the base as it is, which is only measured.
    """

    dimension: int | None
    seed: int

    @property
    def name(self) -> str:
        """What it is called in plans, folders and reports."""
        what = {None: "full", 0: "untrained"}.get(self.dimension, f"d-{self.dimension}")
        return f"{what}-seed-{self.seed}"


@dataclass(frozen=True)
class Search:
    """Where the dimension is looked for: a geometric grid, then bisection on log d.

    A dimension reaches where its mean score, over `seeds`, is at least `share` of what all
    parameters reach: of their accuracy, or with `from_untrained` of what they gain over the
    untrained base (nats, which have no zero of their own). Bisection ends where the bracket's ends
    are within a factor of `tolerance`.
    """

    min_dimension: int = 16
    max_dimension: int = 16384
    grid_points: int = 6
    tolerance: float = 1.3
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 0.9
    from_untrained: bool = False

    def grid(self) -> list[int]:
        """Return the dimensions of the grid, ascending, the ends among them."""
        ratio = self.max_dimension / self.min_dimension
        last = max(self.grid_points - 1, 1)
        points = {round(self.min_dimension * ratio ** (i / last)) for i in range(self.grid_points)}
        return sorted(points)


Scores = Mapping[Trial, float]
"""Finished trials and their scores, higher is better: accuracy, or minus nats a prediction."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters that full fine-tuning trains, and how many each rank of LoRA adds."""

    parameters: int
    lora_parameters_a_rank: int

    def rank_of(self, parameters: float) -> int:
        """Return the least rank at which LoRA has at least so many parameters."""
        return max(1, math.ceil(parameters / self.lora_parameters_a_rank))


@dataclass(frozen=True)
class Point:
    """A dimension of the curve: its share of what all parameters reach, a mean over the seeds.

    `fitted` is the isotonic fit there, `standard_error` that of the mean.
    """

    dimension: int
    share: float
    fitted: float
    standard_error: float


@dataclass(frozen=True)
class Dimension:
    """What a search came to.

    `dimension` is where the fitted curve meets `share` of full fine-tuning (d90 for 0.9), None:
    not reached; `lowest` says that the least dimension tried reaches it already, so that the true
    one is at most that. `interval` covers 95 % of the bootstrap over seeds; None in it: not
    reached. `full` and `untrained` are mean scores.
    """

    share: float
    dimension: float | None
    lowest: bool
    interval: tuple[float | None, float | None]
    curve: tuple[Point, ...]
    full: float
    untrained: float | None
    seeds: int
    trials: int
    parameters: int
    lora_rank: int | None

    @property
    def reached(self) -> bool:
        """Whether any dimension that was tried reaches the share."""
        return self.dimension is not None

    def sentence(self) -> str:
        """Return it in words."""
        name = f"d{round(100 * self.share)}"
        largest = self.curve[-1].dimension
        start = 0.0 if self.untrained is None else self.untrained
        if self.full <= start:
            return (
                f"{name}: not reached, as full fine-tuning gains nothing: a mean score of "
                f"{self.full:.4g} from {start:.4g}; change how it trains"
            )
        if self.dimension is None:
            return f"{name}: not reached with up to {largest} dimensions"
        low, high = ("not reached" if end is None else f"{end:.0f}" for end in self.interval)
        at_most = "at most " if self.lowest else ""
        return (
            f"{name}: {at_most}{self.dimension:.0f} of {self.parameters} (95 % interval {low} to "
            f"{high}), which suggests LoRA of rank {self.lora_rank}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"reached": self.reached}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Dimension":
        """Return what `as_json` gave."""
        low, high = values["interval"]
        given = {field.name: values[field.name] for field in fields(cls)}
        curve = tuple(Point(**point) for point in values["curve"])
        return cls(**given | {"interval": (low, high), "curve": curve})


def next_trials(search: Search, finished: Scores) -> list[Trial]:
    """Return the trials of the next round, none where the search is over.

    Those of one round do not depend on each other. The first is the grid, all parameters, and
    where the score needs it the untrained base; each further one a dimension between the last that
    fails and the first that reaches.
    """
    first: list[int | None] = [None, *([0] if search.from_untrained else []), *search.grid()]
    waiting = _missing(search, finished, first)
    if waiting:
        return waiting
    middle = _bisected(search, finished)
    return [] if middle is None else _missing(search, finished, [middle])


def conclude(search: Search, finished: Scores, size: ModelSize, *, seed: int = 0) -> Dimension:
    """Return what the finished trials come to; `seed` draws the bootstrap.

    Dimensions count at which every seed has finished; the first round must have.
    """
    tried = dimensions_tried(search, finished)
    curve = _curve(search, finished, search.seeds)
    fitted = isotonic(curve)
    crossing = _crossing(tried, fitted, search.share)
    errors = [_standard_error(search, finished, dimension) for dimension in tried]
    points = zip(tried, curve, fitted, errors, strict=True)
    chance = random.Random(seed)
    drawn = []
    for _ in range(BOOTSTRAPS):
        seeds = chance.choices(search.seeds, k=len(search.seeds))
        again = isotonic(_curve(search, finished, seeds))
        drawn.append(_crossing(tried, again, search.share))
    untrained = _mean(finished, 0, search.seeds) if search.from_untrained else None
    return Dimension(
        share=search.share,
        dimension=crossing,
        lowest=fitted[0] >= search.share,
        interval=_percentiles(drawn),
        curve=tuple(Point(*point) for point in points),
        full=_mean(finished, None, search.seeds),
        untrained=untrained,
        seeds=len(search.seeds),
        trials=len(finished),
        parameters=size.parameters,
        lora_rank=None if crossing is None else size.rank_of(crossing),
    )


def best_trial(found: Dimension, finished: Scores) -> Trial | None:
    """Return the best trial of the least dimension whose mean reaches; None where none does."""
    reaching = [point.dimension for point in found.curve if point.fitted >= found.share]
    if not reaching:
        return None
    same = [trial for trial in finished if trial.dimension == reaching[0]]
    return max(same, key=lambda trial: finished[trial])


def dimensions_tried(search: Search, finished: Scores) -> list[int]:
    """Return the dimensions at which every seed has finished, ascending."""
    every = {trial.dimension for trial in finished if trial.dimension}
    return sorted(
        dimension
        for dimension in every
        if dimension and not _missing(search, finished, [dimension])
    )


def isotonic(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence with the least sum of squared differences from `values`.

    Pool adjacent violators (Barlow et al. 1972): neighbours in the wrong order become their mean.
    """
    pools: list[tuple[float, int]] = []  # sum and number of the values in each
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            (total, count), (before, number) = pools.pop(), pools.pop()
            pools.append((before + total, number + count))
    return [total / count for total, count in pools for _ in range(count)]


def _missing(search: Search, finished: Scores, dimensions: Sequence[int | None]) -> list[Trial]:
    every = [Trial(dimension, seed) for dimension in dimensions for seed in search.seeds]
    return [trial for trial in every if trial not in finished]


def _bisected(search: Search, finished: Scores) -> int | None:
    """Return the dimension to try next; None where no bracket is left that is wide enough."""
    tried = dimensions_tried(search, finished)
    fitted = isotonic(_curve(search, finished, search.seeds))
    above = [d for d, share in zip(tried, fitted, strict=True) if share >= search.share]
    below = [d for d, share in zip(tried, fitted, strict=True) if share < search.share]
    if not above or not below:
        return None
    low, high = below[-1], above[0]
    middle = round(math.sqrt(low * high))
    return middle if high / low > search.tolerance and low < middle < high else None


def _curve(search: Search, finished: Scores, seeds: Sequence[int]) -> list[float]:
    """Return the share of full fine-tuning at each dimension, over some seeds."""
    start = _mean(finished, 0, seeds) if search.from_untrained else 0.0
    gain = _mean(finished, None, seeds) - start
    # Where all parameters gain nothing, there is no share of it that could be reached.
    return [
        (_mean(finished, dimension, seeds) - start) / gain if gain > 0 else 0.0
        for dimension in dimensions_tried(search, finished)
    ]


def _standard_error(search: Search, finished: Scores, dimension: int) -> float:
    """Return the standard error of a mean share over seeds, that of full fine-tuning apart."""
    start = _mean(finished, 0, search.seeds) if search.from_untrained else 0.0
    gain = _mean(finished, None, search.seeds) - start
    count = len(search.seeds)
    if count < 2 or gain <= 0:
        return 0.0
    values = [finished[Trial(dimension, seed)] for seed in search.seeds]
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count) / gain


def _mean(finished: Scores, dimension: int | None, seeds: Sequence[int]) -> float:
    return sum(finished[Trial(dimension, seed)] for seed in seeds) / len(seeds)


def _crossing(dimensions: Sequence[int], fitted: Sequence[float], share: float) -> float | None:
    """Return where the fit, linear in log d between its points, first meets `share`."""
    for place, (dimension, value) in enumerate(zip(dimensions, fitted, strict=True)):
        if value >= share:
            if place == 0:
                return float(dimension)
            low, before = dimensions[place - 1], fitted[place - 1]
            part = (share - before) / (value - before)
            return math.exp(math.log(low) + part * (math.log(dimension) - math.log(low)))
    return None


def _percentiles(drawn: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return the ends of the middle 95 %; not reached counts as above every number."""
    ordered = sorted(math.inf if value is None else value for value in drawn)
    tail = (1 - COVERAGE) / 2
    ends = [
        ordered[round(tail * (len(ordered) - 1))],
        ordered[round((1 - tail) * (len(ordered) - 1))],
    ]
    low, high = (None if math.isinf(end) else end for end in ends)
    return low, high
