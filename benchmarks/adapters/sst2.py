"""Every method on SST-2, on the full and on the 4-bit base."""

from statistics import fmean
from typing import Any

from benchmarks.adapters.methods import (
    FULL,
    HOULSBY,
    LORA,
    METHODS,
    TOP_LAYERS,
    Method,
)
from benchmarks.adapters.places import measure_path
from benchmarks.adapters.work import (
    BASES,
    PASSES,
    PRECISION,
    SEEDS,
    TRAIN_EXAMPLES,
    base_folder,
    result_of,
    test_examples,
)
from benchmarks.claims import Claim, at_least, at_most, write_measure
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import Right, has_sst2, points_lost

UPPER = 1.96  # standard errors
Score = dict[tuple[str, str], Right]
"""By base and method."""


def measure_sst2() -> None:
    """Train every method on both bases with every seed, and compare on held-out phrases."""
    if not has_sst2():
        return
    for base in BASES:
        base_folder(base)
    cells = [(method, base, seed) for seed in SEEDS for base in BASES for method in METHODS]
    found = side_by_side(result_of, cells, PRECISION)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (method, base, _), result in zip(cells, found, strict=True):
        results.setdefault((base, method.name), []).append(result)
    right = {key: [each["right"] for each in every] for key, every in results.items()}
    rows = [_row(method, base, results, right) for base in BASES for method in METHODS]
    write_measure(
        measure_path("sst2"),
        claims_of(right, rows),
        text="SST-2",
        seeds=len(SEEDS),
        examples=len(test_examples()),
        train_examples=TRAIN_EXAMPLES,
        passes=PASSES,
        rows=rows,
    )


def claims_of(right: Score, rows: list[dict[str, Any]]) -> list[Claim]:
    """Return what was promised of these figures."""
    dense, packed = BASES
    full = right[dense, FULL.name]
    share = {row["method"]: row["trained_share"] for row in rows if row["base"] == dense}
    claims = [
        _within(
            f"{method.name}: points lost against full fine-tuning", full, right[dense, method.name]
        )
        for method in (HOULSBY, LORA)
    ]
    claims.append(at_most("Houlsby: trained parameters, %", 3.6, share[HOULSBY.name]))
    claims.append(_top_layers(rows))
    claims += [
        _within(
            f"{method.name} at {packed}: points lost against itself on fp32",
            right[dense, method.name],
            right[packed, method.name],
        )
        for method in METHODS
    ]
    return claims


def _within(claim: str, before: Right, after: Right) -> Claim:
    loss = points_lost(before, after, test_examples())
    return at_most(
        f"SST-2, {claim}, upper 95 % bound of the paired difference",
        1.0,
        loss.value + UPPER * loss.standard_error,
        loss.standard_error,
    )


def _top_layers(rows: list[dict[str, Any]]) -> Claim:
    """Return by how many times the parameters trained layers need Houlsby's score."""
    dense = {row["method"]: row for row in rows if row["base"] == BASES[0]}
    houlsby = dense[HOULSBY.name]
    enough = [
        dense[method.name]["trained"]
        for method in (*TOP_LAYERS.values(), FULL)
        if dense[method.name]["accuracy"] >= houlsby["accuracy"]
    ]
    times = min(enough) / houlsby["trained"] if enough else float("inf")
    return at_least(
        "SST-2: parameters of the fewest top layers (or all) that reach Houlsby's score, over "
        "Houlsby's",
        10.0,
        times,
    )


def _row(
    method: Method, base: str, results: dict[tuple[str, str], list[dict[str, Any]]], right: Score
) -> dict[str, Any]:
    here = results[base, method.name]
    lost = points_lost(right[BASES[0], FULL.name], right[base, method.name], test_examples())
    itself = points_lost(right[BASES[0], method.name], right[base, method.name], test_examples())
    trained, whole = here[0]["trained"], results[BASES[0], FULL.name][0]["trained"]
    return {
        "base": base,
        "method": method.name,
        "trained": trained,
        "trained_share": 100 * trained / whole,
        "accuracy": 100 * fmean(fmean(each["right"]) for each in here),
        "lost": lost.value,
        "standard_error": lost.standard_error,
        "lost_itself": itself.value,
        "itself_error": itself.standard_error,
        "glue": 100 * fmean(fmean(each["glue"]) for each in here),
        "learning_rate": method.learning_rate,
    }
