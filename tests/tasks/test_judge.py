import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.compress import _candidate
from flows.road import Made, Measured
from stillroom.config import BASE_TEXT, Gates
from stillroom.evaluation.estimates import Quality, exact
from stillroom.evaluation.figures import Cost
from tasks.judge import Candidate, judge_candidate
from tasks.store.record import Record
from tasks.store.store import ArtifactStore, open_store

QUALITY = Quality(
    task="causal_lm",
    documents=(0, 1, 2),
    counts=(10, 10, 10),
    nats=(30.0, 31.0, 29.0),
    kl_nats=(1.0, 1.1, 0.9),
    agreed=(5, 6, 5),
    correct=(3, 3, 3),
)
COST = Cost(
    parameters=10,
    size_on_disk_bytes=40,
    memory_bytes=40,
    prefill_per_second=exact(1.0),
    prefill_unit="tokens/s",
    decode_tokens_per_second=exact(1.0),
    latency_ms=exact(1.0),
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


def add(store: ArtifactStore, folder: Path, kind: str, key: str, **facts: Any) -> Record:
    defaults: dict[str, Any] = {"inputs": {}, "section": {}, "versions": {}, "stage_version": 1}
    return store.add(folder, kind=kind, key=key * 64, **(defaults | facts))


def judged(store: ArtifactStore, folder: Path, **model: Any) -> dict[str, bool]:
    folder.mkdir()
    (folder / "quality.json").write_text(QUALITY.to_json())
    (folder / "cost.json").write_text(COST.to_json())
    evaluation = add(store, folder, "evaluation", "a")
    candidate = Candidate(
        add(store, folder, "model", "b", **model), evaluation, evaluation, champion=None
    )
    gates = judge_candidate.fn(candidate, Gates(), SimpleNamespace(store=store))
    return {gate.name: gate.passed for gate in gates}


def test_a_model_that_was_only_imported_has_nothing_to_load_afresh(
    store: ArtifactStore, tmp_path: Path
) -> None:
    gates = judged(store, tmp_path / "made", inputs={"source": "c"})
    assert gates == {"finite": True, "fallback": True}


@pytest.mark.parametrize(("difference", "passed"), [(0.0005, True), (0.1, False)])
def test_a_made_model_must_load_as_what_it_was(
    difference: float, passed: bool, store: ArtifactStore, tmp_path: Path
) -> None:
    metrics = {"reload_max_difference": difference, "reload_max_logit": 1.0}
    gates = judged(store, tmp_path / "made", metrics=metrics, inputs={"base": "c"})
    assert gates["reload"] is passed


def test_a_made_model_that_was_not_checked_fails(store: ArtifactStore, tmp_path: Path) -> None:
    assert judged(store, tmp_path / "made", inputs={"base": "c"})["reload"] is False


@pytest.mark.parametrize(
    ("metrics", "layers", "failed"),
    [
        ({"reload_max_difference": 0.0, "reload_max_logit": 1.0}, [], set()),
        ({"reload_max_difference": 0.1, "reload_max_logit": 1.0}, [], {"reload (law)"}),
        ({}, [], {"reload (law)"}),
        (
            {"reload_max_difference": 0.0, "reload_max_logit": 1.0},
            [{"name": "lm_head", "fell_back": True}],
            {"fallback (law)"},
        ),
    ],
)
def test_a_merged_model_is_judged_too(
    metrics: dict[str, float],
    layers: list[dict[str, Any]],
    failed: set[str],
    store: ArtifactStore,
    tmp_path: Path,
) -> None:
    (tmp_path / "quality.json").write_text(QUALITY.to_json())
    (tmp_path / "cost.json").write_text(COST.to_json())
    evaluation = add(store, tmp_path, "evaluation", "a")
    base = add(store, tmp_path, "model", "b", inputs={"source": "c"})
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    merged = add(store, tmp_path, "model", "d", metrics=metrics)
    candidate = Candidate(base, evaluation, evaluation, None, {"law": (merged, evaluation)})
    bounds = Gates(max_size_bytes=100)
    gates = judge_candidate.fn(candidate, bounds, SimpleNamespace(store=store))
    assert [gate.name for gate in gates] == [
        "finite", "fallback", "size", "finite (law)", "fallback (law)", "reload (law)",
    ]  # fmt: skip
    assert {gate.name for gate in gates if not gate.passed} == failed
    assert all(gate.sentence.startswith("law merged: ") for gate in gates[3:])


def test_what_adapters_are_merged_into_comes_before_the_judge() -> None:
    teacher, small, merged = (SimpleNamespace(key=key) for key in "abc")
    measured = [
        Measured("teacher", BASE_TEXT, teacher, "of the teacher"),
        Measured("quantized", BASE_TEXT, small, "of the small one"),
        Measured("quantized", "law", small, "on law"),
        Measured("quantized + law", "law", small, "with law", "an adapter"),
        Measured("quantized + law, merged", "law", merged, "of the merged one"),
    ]
    made: Any = Made(teacher, "data", small, {"law": "an adapter"}, {"law": merged}, measured)
    candidate = _candidate(made, None)
    assert (candidate.model, candidate.evaluation) == (small, "of the small one")
    assert candidate.merged == {"law": (merged, "of the merged one")}
