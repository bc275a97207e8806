"""Say which stage lost what, and whether one model really beats another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stillroom.evaluation.estimates import Estimate, Metric, Quality, paired_estimate


@dataclass(frozen=True)
class LossStep:
    """What one stage added to the loss of the model before it."""

    name: str
    previous: str
    nats: Estimate
    """Added cross-entropy per prediction, in nats, paired by document; negative is a gain."""
    share: float | None
    """Part of the whole chain's loss; None where the whole is not above its noise."""


@dataclass(frozen=True)
class Verdict:
    """A claim that one model beats another on the same text."""

    claim: str
    holds: bool
    gain: Estimate
    """How much better, in `unit`, paired by document."""
    unit: str
    sentence: str


def attribute_loss(chain: Sequence[tuple[str, Quality]]) -> tuple[LossStep, ...]:
    """Return one step for each model of `chain` after the first, in order.

    The steps' nats add up to the whole loss, and the shares to 1 where they are given.

    Raises:
        MismatchError: the models were measured on different data.
    """
    if len(chain) < 2:
        return ()
    whole = paired_estimate(chain[-1][1], chain[0][1], "nats")
    lower = whole.lower()
    clear = whole.value > 0 and (lower is None or lower > 0)
    steps = []
    for (previous, before), (name, after) in pairwise(chain):
        added = paired_estimate(after, before, "nats")
        share = added.value / whole.value if clear else None
        steps.append(LossStep(name, previous, added, share))
    return tuple(steps)


def judge(claim: str, better: Quality, worse: Quality, metric: Metric = "nats") -> Verdict:
    """Test that `better` beats `worse` in `metric` on the same text.

    It holds if the one-sided 95 % confidence bound of the gain, paired by document, is above 0.

    Raises:
        MismatchError: the models were measured on different data.
    """
    if metric in ("agreement", "accuracy"):
        gain, unit = paired_estimate(better, worse, metric), "of predictions"
    else:
        gain = paired_estimate(worse, better, metric)
        unit = "perplexity" if metric == "perplexity" else "nats"
    lower = gain.lower()
    holds = lower is not None and lower > 0
    if holds:
        answer = "yes"
    elif lower is None:
        answer = "not shown (one document gives no standard error)"
    elif gain.value > 0:
        answer = "not shown (within the noise)"
    else:
        answer = "no"
    error = "" if gain.standard_error is None else f" ± {gain.standard_error:.2g}"
    sentence = f"{claim}: {answer}, by {gain.value:.3g}{error} {unit}"
    return Verdict(claim, holds, gain, unit, sentence)
