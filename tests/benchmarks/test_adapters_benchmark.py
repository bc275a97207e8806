"""The parts of benchmarks/adapters that a wrong factor would spoil silently."""

import json
from typing import Any

import pytest

from benchmarks.adapters import sst2
from benchmarks.adapters.methods import FULL, HOULSBY, LORA, METHODS, TOP_LAYERS
from benchmarks.adapters.results import PAGE, RESULTS, summarise
from benchmarks.adapters.work import BASES
from benchmarks.phrases import Example
from benchmarks.sst2 import Right, points_lost

TEST = [Example("", 1, place // 2) for place in range(40)]


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Right]:
    """Return three seeds of forty phrases in twenty sentences, all of them right."""
    monkeypatch.setattr(sst2, "test_examples", lambda: TEST)
    return {(base, method.name): [[True] * 40] * 3 for base in BASES for method in METHODS}


def rows(**accuracy: float) -> list[dict[str, Any]]:
    """Return rows with as many trained parameters as a method has letters, thousands of them."""
    return [
        {
            "base": base,
            "method": method.name,
            "trained": 100 if method is HOULSBY else 1000 * len(method.name),
            "trained_share": 0.5,
            "accuracy": accuracy.get(method.name.split(" ")[0].strip(","), 80.0),
        }
        for base in BASES
        for method in METHODS
    ]


def test_what_is_lost_is_counted_in_points_and_only_the_upper_bound_decides(right: Any) -> None:
    claims = sst2.claims_of(right, rows(Houlsby=80.0))
    assert all(claim.holds for claim in claims)
    right[BASES[0], LORA.name] = [[False] * 2 + [True] * 38] * 3
    lost = points_lost(right[BASES[0], FULL.name], right[BASES[0], LORA.name], TEST)
    assert lost.value == pytest.approx(5.0)
    assert lost.standard_error == pytest.approx(5.0, rel=0.05)  # one sentence of twenty
    measured = {claim.claim: claim.measured for claim in sst2.claims_of(right, rows())}
    of_lora = {claim: value for claim, value in measured.items() if LORA.name in claim}
    against_full, against_itself = (
        next(value for claim, value in of_lora.items() if words in claim)
        for words in ("full fine-tuning", f"at {BASES[1]}")
    )
    error = 1.96 * lost.standard_error
    assert against_full == pytest.approx(5 + error)
    assert against_itself == pytest.approx(-5 + error)  # its 4-bit self is the better one


def test_what_each_seed_loses_elsewhere_averages_out_between_sentences() -> None:
    every: Right = [[True] * 40] * 3
    elsewhere: Right = [[place // 2 != seed for place in range(40)] for seed in range(3)]
    lost = points_lost(every, elsewhere, TEST)
    assert lost.value == pytest.approx(5.0)
    assert lost.standard_error == pytest.approx(5 / 3**0.5, rel=0.07)  # a third of three sentences


def test_what_only_some_seeds_lose_is_an_error_too() -> None:
    every: Right = [[True] * 40] * 2
    once: Right = [[False] * 40, [True] * 40]
    lost = points_lost(every, once, TEST)
    assert (lost.value, lost.standard_error) == (50, pytest.approx(50))


def test_layers_on_top_count_where_they_reach_houlsbys_score(right: Any) -> None:
    def times(found: list[dict[str, Any]]) -> float:
        (claim,) = [c for c in sst2.claims_of(right, found) if "fewest top layers" in c.claim]
        return claim.measured

    reached = rows(Houlsby=79.0)
    least = min(1000 * len(method.name) for method in (*TOP_LAYERS.values(), FULL))
    assert times(reached) == pytest.approx(least / 100)
    assert times(rows(Houlsby=99.0)) == float("inf")  # nothing reaches it, however many


def test_every_claim_names_its_method_once(right: Any) -> None:
    claims = [claim.claim for claim in sst2.claims_of(right, rows())]
    assert len(set(claims)) == len(claims) == 2 + 1 + 1 + len(METHODS)


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == summarise(json.loads(RESULTS.read_text()))
