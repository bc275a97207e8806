from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.config import Gates
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
