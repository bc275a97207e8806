"""A measured number with its standard error, and the sums it is made from.

Tokens of one document resemble each other, so the document, not the token, is the independent
sample. A mean over tokens is a ratio of two sums over documents, and its standard error comes
from linearising that ratio (Cochran 1977, Sampling Techniques, section 6.3):

    R = Σ_c y_c / Σ_c n_c,    e_c = (y_c − R n_c) / Σ n,    SE² = C/(C−1) Σ_c e_c²

Two models measured on the same documents are compared through the differences of their e_c,
which removes what the documents have in common.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from stillroom.errors import MismatchError

Metric = Literal["nats", "perplexity", "kl_nats", "agreement", "accuracy"]


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and how many independent samples stand behind it.

    `standard_error` is None where one sample gives no idea of the spread.
    """

    value: float
    standard_error: float | None = None
    samples: int = 1

    def upper(self) -> float | None:
        """Return the one-sided upper 95 % confidence bound, or None without a standard error."""
        margin = self._margin()
        return None if margin is None else self.value + margin

    def lower(self) -> float | None:
        """Return the one-sided lower 95 % confidence bound, or None without a standard error."""
        margin = self._margin()
        return None if margin is None else self.value - margin

    def _margin(self) -> float | None:
        if self.standard_error is None:
            return None
        if self.standard_error == 0:
            return 0.0
        return student_quantile_95(self.samples - 1) * self.standard_error


def exact(value: float) -> Estimate:
    """Return a number that was counted, not sampled."""
    return Estimate(value, 0.0, 1)


@dataclass(frozen=True)
class Quality:
    """How good a model is on some text, as sums per document.

    The entries of every tuple belong to `documents`, in ascending order. A prediction is a token
    (causal_lm), a hidden word (masked_lm) or a row (sequence_classification).
    """

    task: Literal["causal_lm", "masked_lm", "sequence_classification"]
    documents: tuple[int, ...]
    counts: tuple[int, ...]
    """Predictions."""
    nats: tuple[float, ...]
    """Cross-entropy against the labels, summed, in nats."""
    kl_nats: tuple[float, ...]
    """KL(teacher ‖ model), summed, in nats."""
    agreed: tuple[int, ...]
    """Predictions whose most likely class is the teacher's."""
    correct: tuple[int, ...]
    """Predictions whose most likely class is the label."""

    @property
    def predictions(self) -> int:
        """Count the tokens, hidden words or rows that were predicted."""
        return sum(self.counts)

    def estimate(self, metric: Metric) -> Estimate:
        """Return the mean of `metric` per prediction, its standard error clustered by document.

        "perplexity" is exp(mean nats), with the standard error of the delta method; of hidden
        words it is a pseudo-perplexity, no text's probability.
        """
        value, influence = self._linearised(metric)
        return Estimate(value, _clustered_error(influence), len(self.documents))

    def to_json(self) -> str:
        """Return the sums as JSON text; numbers survive the round trip exactly."""
        from pydantic import TypeAdapter

        return TypeAdapter(Quality).dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> "Quality":
        """Return what `to_json` wrote."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)

    def _linearised(self, metric: Metric) -> tuple[float, list[float]]:
        sums: Sequence[float]
        match metric:
            case "nats" | "perplexity":
                sums = self.nats
            case "kl_nats":
                sums = self.kl_nats
            case "agreement":
                sums = self.agreed
            case "accuracy":
                sums = self.correct
        total = self.predictions
        mean = math.fsum(sums) / total
        influence = [(y - mean * n) / total for y, n in zip(sums, self.counts, strict=True)]
        if metric != "perplexity":
            return mean, influence
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return perplexity, [perplexity * e for e in influence]


def paired_estimate(a: Quality, b: Quality, metric: Metric) -> Estimate:
    """Return a − b of `metric`, both measured on the same documents.

    Raises:
        MismatchError: they were measured on different data.
    """
    require_same_data(a, b)
    (value_a, influence_a), (value_b, influence_b) = a._linearised(metric), b._linearised(metric)
    influence = [x - y for x, y in zip(influence_a, influence_b, strict=True)]
    return Estimate(value_a - value_b, _clustered_error(influence), len(a.documents))


def paired_difference(a: Quality, b: Quality, metric: Metric) -> tuple[float, float | None]:
    """Return a − b of `metric` and its paired standard error, clustered by document.

    Raises:
        MismatchError: they were measured on different data.
    """
    difference = paired_estimate(a, b, metric)
    return difference.value, difference.standard_error


def paired_ratio(a: Quality, b: Quality, metric: Metric) -> Estimate:
    """Return a / b of `metric`, its standard error by the delta method on the same documents.

    Raises:
        MismatchError: they were measured on different data.
    """
    require_same_data(a, b)
    (value_a, influence_a), (value_b, influence_b) = a._linearised(metric), b._linearised(metric)
    if value_b == 0:
        return Estimate(math.inf if value_a else math.nan, None, len(a.documents))
    ratio = value_a / value_b
    influence = [(x - ratio * y) / value_b for x, y in zip(influence_a, influence_b, strict=True)]
    return Estimate(ratio, _clustered_error(influence), len(a.documents))


def require_same_data(a: Quality, b: Quality) -> None:
    """Refuse to compare results that were not measured on the same predictions.

    Raises:
        MismatchError: tasks, documents or counts differ.
    """
    if (a.task, a.documents, a.counts) == (b.task, b.documents, b.counts):
        return
    raise MismatchError(
        "two results can be compared only on the same data: "
        f"{a.predictions} predictions in {len(a.documents)} documents ({a.task}) against "
        f"{b.predictions} in {len(b.documents)} ({b.task}); measure both on the same examples"
    )


def student_quantile_95(freedom: int) -> float:
    """Return the 95 % quantile of Student's t with `freedom` degrees of freedom.

    Exact for 1 and 2; above, the expansion in 1/freedom about the normal quantile (Abramowitz
    and Stegun 26.7.5), within 0.1 %.
    """
    if freedom <= 1:
        return math.tan(0.45 * math.pi) if freedom == 1 else math.inf
    if freedom == 2:
        return 0.9 * math.sqrt(2 / 0.19)
    z = NormalDist().inv_cdf(0.95)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def _clustered_error(influence: Sequence[float]) -> float | None:
    clusters = len(influence)
    if clusters < 2:
        return None
    return math.sqrt(clusters / (clusters - 1) * math.fsum(e * e for e in influence))
