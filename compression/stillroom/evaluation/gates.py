"""Decide whether a result may be published.

A bound must hold with 95 % confidence, one-sided: the upper confidence bound of a loss must lie
within its limit, the lower one of a speed or an agreement above its own. So noise never carries
a model through a gate; a figure that was not measured, or has no standard error, fails.
Quality is judged on differences and ratios paired by document.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from stillroom.evaluation.estimates import (
    Estimate,
    Quality,
    exact,
    paired_estimate,
    paired_ratio,
)
from stillroom.evaluation.figures import Cost, ReloadCheck


@dataclass(frozen=True)
class GateBounds:
    """What a result must reach; None asks for nothing."""

    max_perplexity_ratio: float | None = None
    """Perplexity over the teacher's."""
    max_kl_nats: float | None = None
    """KL(teacher ‖ model) in nats per prediction."""
    min_agreement: float | None = None
    """Share of predictions where model and teacher prefer the same."""
    min_accuracy_ratio: float | None = None
    """Accuracy over the teacher's."""
    max_champion_loss_nats: float | None = None
    """Nats per prediction lost against the registered champion on the same data."""
    max_size_bytes: int | None = None
    min_decode_tokens_per_second: float | None = None
    max_latency_ms: float | None = None
    """Per generated token, or per sequence for a model that does not generate."""
    max_reload_difference: float = 1e-3
    """Largest change of a logit after loading afresh, over the largest logit."""
    allow_fallback: bool = False
    """Let modules pass that fell back to rounding to nearest."""


@dataclass(frozen=True)
class GateFigures:
    """What was measured of the candidate and of the models it is compared with."""

    candidate: Quality
    teacher: Quality | None = None
    champion: Quality | None = None
    """None where nothing is registered yet: that gate passes."""
    cost: Cost | None = None
    fallback_modules: tuple[str, ...] | None = ()
    """Modules that were to be quantized and were not by the method asked for."""
    reload: ReloadCheck | None = None


@dataclass(frozen=True)
class GateResult:
    """One gate: what was asked, what was measured, and whether it holds."""

    name: str
    expected: str
    measured: float | None
    """None where it was not measured or is not a number."""
    standard_error: float | None
    passed: bool
    sentence: str


def check_gates(figures: GateFigures, bounds: GateBounds) -> list[GateResult]:
    """Return every gate that `bounds` asks for, and those that always hold: NaN, fallback, reload.

    Raises:
        MismatchError: teacher or champion were measured on other data.
    """
    return [
        _finite(figures),
        _fallback(figures, bounds),
        _at_most(
            "reload",
            None if figures.reload is None else exact(figures.reload.relative),
            bounds.max_reload_difference,
            "change of a logit after loading afresh, over the largest logit",
        ),
        *_quality_gates(figures, bounds),
        *_cost_gates(figures, bounds),
    ]


def all_passed(results: list[GateResult]) -> bool:
    """Return whether every gate holds."""
    return all(result.passed for result in results)


def _quality_gates(figures: GateFigures, bounds: GateBounds) -> Iterator[GateResult]:
    candidate, teacher = figures.candidate, figures.teacher
    if bounds.max_perplexity_ratio is not None:
        ratio = None if teacher is None else paired_ratio(candidate, teacher, "perplexity")
        name = "pseudo-perplexity" if candidate.task == "masked_lm" else "perplexity"
        label = f"{name} over the teacher's"
        yield _at_most("perplexity", ratio, bounds.max_perplexity_ratio, label)
    if bounds.max_kl_nats is not None:
        # Where no teacher ran, a quality says 0 and 1 of it.
        kl = None if teacher is None else candidate.estimate("kl_nats")
        label = "KL to the teacher in nats per prediction"
        yield _at_most("kl", kl, bounds.max_kl_nats, label)
    if bounds.min_agreement is not None:
        agreement = None if teacher is None else candidate.estimate("agreement")
        label = "agreement with the teacher"
        yield _at_least("agreement", agreement, bounds.min_agreement, label)
    if bounds.min_accuracy_ratio is not None:
        ratio = None if teacher is None else paired_ratio(candidate, teacher, "accuracy")
        label = "accuracy over the teacher's"
        yield _at_least("accuracy", ratio, bounds.min_accuracy_ratio, label)
    if bounds.max_champion_loss_nats is not None:
        yield _champion(figures, bounds.max_champion_loss_nats)


def _cost_gates(figures: GateFigures, bounds: GateBounds) -> Iterator[GateResult]:
    cost = figures.cost
    if bounds.max_size_bytes is not None:
        size = None if cost is None else exact(cost.size_on_disk_bytes)
        yield _at_most("size", size, bounds.max_size_bytes, "bytes on disk")
    if bounds.min_decode_tokens_per_second is not None:
        speed = None if cost is None else cost.decode_tokens_per_second
        label = "generated tokens/s"
        yield _at_least("decode_speed", speed, bounds.min_decode_tokens_per_second, label)
    if bounds.max_latency_ms is not None:
        latency = None if cost is None else cost.latency_ms
        yield _at_most("latency", latency, bounds.max_latency_ms, "latency in ms")


def _champion(figures: GateFigures, bound: float) -> GateResult:
    if figures.champion is None:
        sentence = "no champion is registered yet: nothing to compare with"
        return GateResult("champion", f"≤ {bound:g}", None, None, True, sentence)
    lost = paired_estimate(figures.candidate, figures.champion, "nats")
    return _at_most("champion", lost, bound, "nats per prediction lost against the champion")


def _finite(figures: GateFigures) -> GateResult:
    qualities = {
        "candidate": figures.candidate,
        "teacher": figures.teacher,
        "champion": figures.champion,
    }
    broken = [
        f"{who} {part.name}"
        for who, quality in qualities.items()
        if quality is not None
        for part in fields(quality)
        if part.name in ("nats", "kl_nats")
        and not all(math.isfinite(value) for value in getattr(quality, part.name))
    ]
    sentence = "every figure is a finite number"
    if broken:
        sentence = f"NaN or infinite: {', '.join(broken)}; look at the stage that made the model"
    return GateResult("finite", "0 figures", float(len(broken)), 0.0, not broken, sentence)


def _fallback(figures: GateFigures, bounds: GateBounds) -> GateResult:
    modules = figures.fallback_modules
    if modules is None:
        return _unmeasured("fallback", "0 modules", "modules that fell back")
    count = float(len(modules))
    if not modules:
        sentence = "every requested module was quantized by the method asked for"
        return GateResult("fallback", "0 modules", count, 0.0, True, sentence)
    shown = ", ".join(modules[:5]) + (" …" if len(modules) > 5 else "")
    noun = "module" if len(modules) == 1 else "modules"
    sentence = f"{len(modules)} {noun} fell back to rounding to nearest: {shown}"
    if bounds.allow_fallback:
        return GateResult("fallback", "any", count, 0.0, True, f"{sentence}; the recipe allows it")
    return GateResult("fallback", "0 modules", count, 0.0, False, sentence)


def _at_most(name: str, figure: Estimate | None, bound: float, label: str) -> GateResult:
    expected = f"≤ {_number(bound)}"
    if figure is None:
        return _unmeasured(name, expected, label)
    limit = figure.upper()
    return _judged(name, expected, figure, limit, label, limit is not None and limit <= bound)


def _at_least(name: str, figure: Estimate | None, bound: float, label: str) -> GateResult:
    expected = f"≥ {_number(bound)}"
    if figure is None:
        return _unmeasured(name, expected, label)
    limit = figure.lower()
    return _judged(name, expected, figure, limit, label, limit is not None and limit >= bound)


def _judged(
    name: str, expected: str, figure: Estimate, limit: float | None, label: str, passed: bool
) -> GateResult:
    finite = math.isfinite(figure.value)
    measured = figure.value if finite else None
    holds = "holds" if passed else "fails"
    if not finite:
        sentence = f"{label}: {figure.value} is not a number that can be judged"
    elif limit is None:
        sentence = (
            f"{label}: {_number(figure.value)} has no standard error; "
            "measure on two documents or more, or time two repeats or more"
        )
    elif figure.standard_error == 0:
        sentence = f"{label}: {_number(figure.value)}; {expected} {holds}"
    else:
        sentence = (
            f"{label}: {_number(figure.value)} ± {figure.standard_error:.2g}, "
            f"95 % bound {_number(limit)}; {expected} {holds}"
        )
    error = figure.standard_error if finite else None
    return GateResult(name, expected, measured, error, passed, sentence)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _unmeasured(name: str, expected: str, label: str) -> GateResult:
    sentence = f"{label}: not measured, so {expected} cannot be shown; measure it or drop the bound"
    return GateResult(name, expected, None, None, False, sentence)
