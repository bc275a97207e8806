"""Every gate passes and fails where it should."""

import math
import random
from dataclasses import replace

import pytest

from stillroom.evaluation.cost import Cost
from stillroom.evaluation.estimates import Estimate, Quality, paired_ratio
from stillroom.evaluation.gates import GateBounds, GateFigures, all_passed, check_gates
from stillroom.evaluation.reload import ReloadCheck

DOCUMENTS = tuple(range(20))
COUNTS = tuple(100 + 5 * d for d in DOCUMENTS)


def measured(nats=3.0, kl=0.2, agreed=0.8, correct=0.5, seed=0, noise=0.05) -> Quality:
    draw = random.Random(seed)
    each = [(n, draw.gauss(0, noise)) for n in COUNTS]
    return Quality(
        task="causal_lm",
        documents=DOCUMENTS,
        counts=COUNTS,
        nats=tuple(n * (nats + e) for n, e in each),
        kl_nats=tuple(n * (kl + e / 10) for n, e in each),
        agreed=tuple(round(n * (agreed + e / 10)) for n, e in each),
        correct=tuple(round(n * (correct + e / 10)) for n, e in each),
    )


COST = Cost(
    parameters=1000,
    size_on_disk_bytes=4000,
    memory_bytes=4100,
    prefill_per_second=Estimate(100.0, 2.0, 5),
    prefill_unit="tokens/s",
    decode_tokens_per_second=Estimate(20.0, 0.5, 5),
    latency_ms=Estimate(50.0, 1.0, 5),
)
GOOD = GateFigures(
    candidate=measured(3.1, seed=1),
    teacher=measured(3.0),
    champion=measured(3.1, seed=2),
    cost=COST,
    reload=ReloadCheck(1e-6, 10.0),
)


def gate(name, figures=GOOD, **bounds):
    results = {result.name: result for result in check_gates(figures, GateBounds(**bounds))}
    return results[name]


def test_without_bounds_three_gates_remain():
    results = check_gates(GOOD, GateBounds())
    assert [result.name for result in results] == ["finite", "fallback", "reload"]
    assert all_passed(results)
    assert not all_passed([*results, replace(results[0], passed=False)])


@pytest.mark.parametrize(
    ("name", "bound", "holds", "fails"),
    [
        ("perplexity", "max_perplexity_ratio", 1.2, 1.05),
        ("kl", "max_kl_nats", 0.25, 0.19),
        ("agreement", "min_agreement", 0.75, 0.81),
        ("accuracy", "min_accuracy_ratio", 0.95, 1.05),
        ("champion", "max_champion_loss_nats", 0.1, 0.0),
        ("size", "max_size_bytes", 4000, 3999),
        ("decode_speed", "min_decode_tokens_per_second", 18.0, 21.0),
        ("latency", "max_latency_ms", 60.0, 49.0),
    ],
)
def test_each_bound_passes_and_fails(name, bound, holds, fails):
    passed, failed = gate(name, **{bound: holds}), gate(name, **{bound: fails})
    assert passed.passed
    assert passed.sentence.endswith("holds")
    assert not failed.passed
    assert failed.sentence.endswith("fails")
    assert failed.measured == passed.measured


def test_a_measurement_within_the_bound_but_not_its_error_fails():
    ratio = paired_ratio(GOOD.candidate, GOOD.teacher, "perplexity")
    between = (ratio.value + ratio.upper()) / 2
    result = gate("perplexity", max_perplexity_ratio=between)
    assert result.measured < between
    assert not result.passed
    assert gate("perplexity", max_perplexity_ratio=ratio.upper() + 1e-9).passed


def test_equal_to_the_bound_without_noise_passes():
    same = replace(GOOD, candidate=GOOD.teacher)
    assert gate("perplexity", same, max_perplexity_ratio=1.0).passed


def test_nan_fails():
    broken = replace(GOOD.candidate, nats=(math.nan, *GOOD.candidate.nats[1:]))
    result = gate("finite", replace(GOOD, candidate=broken))
    assert not result.passed
    assert "candidate nats" in result.sentence
    ratio = gate("perplexity", replace(GOOD, candidate=broken), max_perplexity_ratio=9.0)
    assert not ratio.passed
    assert ratio.measured is None


def test_a_fallback_fails_unless_allowed():
    fell = replace(GOOD, fallback_modules=("model.layers.3.mlp.up_proj",))
    result = gate("fallback", fell)
    assert not result.passed
    assert result.measured == 1
    assert "model.layers.3.mlp.up_proj" in result.sentence
    assert gate("fallback", fell, allow_fallback=True).passed
    assert not gate("fallback", replace(GOOD, fallback_modules=None)).passed


@pytest.mark.parametrize(
    "check",
    [None, ReloadCheck(0.1, 10.0), ReloadCheck(math.nan, 10.0), ReloadCheck(1.0, 0.0)],
)
def test_a_reload_that_differs_or_was_not_tried_fails(check):
    assert not gate("reload", replace(GOOD, reload=check)).passed


def test_the_first_model_has_no_champion_to_beat():
    result = gate("champion", replace(GOOD, champion=None), max_champion_loss_nats=0.0)
    assert result.passed
    assert result.measured is None


@pytest.mark.parametrize(
    ("name", "bounds", "missing"),
    [
        ("perplexity", {"max_perplexity_ratio": 9.0}, {"teacher": None}),
        ("kl", {"max_kl_nats": 9.0}, {"teacher": None}),
        ("agreement", {"min_agreement": 0.0}, {"teacher": None}),
        ("accuracy", {"min_accuracy_ratio": 0.1}, {"teacher": None}),
        ("size", {"max_size_bytes": 10**9}, {"cost": None}),
        ("latency", {"max_latency_ms": 1e9}, {"cost": None}),
        (
            "decode_speed",
            {"min_decode_tokens_per_second": 0.1},
            {"cost": replace(COST, decode_tokens_per_second=None)},
        ),
    ],
)
def test_what_was_not_measured_fails(name, bounds, missing):
    result = gate(name, replace(GOOD, **missing), **bounds)
    assert not result.passed
    assert "not measured" in result.sentence


def test_without_a_standard_error_nothing_is_shown():
    one = Quality("causal_lm", (0,), (10,), (30.0,), (0.1,), (9,), (5,))
    result = gate("kl", replace(GOOD, candidate=one, champion=None), max_kl_nats=1.0)
    assert not result.passed
    assert "no standard error" in result.sentence
