"""Two methods on the same test rows and draws: differences and ratios with their errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float


Table = Sequence[Sequence[float]]  # (draws, rows)


def paired_difference(ours: Table, theirs: Table) -> Estimate:
    """Return the mean of ours - theirs, paired over test rows and calibration draws.

    Both are (draws, rows) of the same draws and rows. The error has two parts, added: the spread
    over rows of the differences' means over draws, and over draws of their means over rows.
    """
    differences = _differences(ours, theirs)
    by_row = [fmean(row) for row in zip(*differences, strict=True)]
    by_draw = [fmean(draw) for draw in differences]
    return Estimate(fmean(by_row), math.sqrt(_squared_error(by_row) + _squared_error(by_draw)))


def paired_ratio(ours: Table, theirs: Table) -> Estimate:
    """Return the ratio of the means, ours to theirs, with the delta method's error.

    The ratio r moves by (ours - r theirs) / mean(theirs) with each row and each draw.
    """
    mean = fmean(fmean(draw) for draw in theirs)
    ratio = fmean(fmean(draw) for draw in ours) / mean
    scaled = [[ratio * each for each in draw] for draw in theirs]
    return Estimate(ratio, paired_difference(ours, scaled).standard_error / mean)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and its standard error."""
    return Estimate(fmean(values), math.sqrt(_squared_error(values)))


def _differences(ours: Table, theirs: Table) -> list[list[float]]:
    return [
        [a - b for a, b in zip(left, right, strict=True)]
        for left, right in zip(ours, theirs, strict=True)
    ]


def _squared_error(values: Sequence[float]) -> float:
    return variance(values) / len(values) if len(values) > 1 else 0.0
