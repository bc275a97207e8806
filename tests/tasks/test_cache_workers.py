"""The stage that asks the teacher, alone and with workers: the same bytes, whatever happens."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from stillroom.config import Distillation
from stillroom.data.prepare import PreparedData, save_prepared
from stillroom.distillation import teacher_cache
from stillroom.errors import NotFiniteError, StageError
from stillroom.models import save_model, tokenizer_hash
from stillroom.progress import silent
from tasks.stages import CACHE_TEACHER, Order, as_json
from tasks.store.claims import StoreClaims
from tasks.store.store import open_store
from tasks.work import cache_teacher
from tasks.work.bench import Bench, Result
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

ROWS = 96


class Stage:
    """A teacher and rows on disk, and a store; `run` does the stage's work in this process."""

    def __init__(self, folder: Path, model: Any, rows: Any) -> None:
        self.folder = folder
        tokenizer = tiny_tokenizer()
        save_model(model, tokenizer, folder / "teacher")
        rows = replace(rows, tokenizer_hash=tokenizer_hash(tokenizer))
        save_prepared(PreparedData(rows, rows, rows, {}), folder / "data")

    def run(
        self,
        name: str,
        workers: int,
        progress: Any = silent,
        device_map: str | None = None,
        **cache: Any,
    ) -> Result:
        section = as_json(Distillation.model_validate({"cache": cache}).cache)
        order = Order(
            title="cache teacher",
            stage=CACHE_TEACHER,
            section=section | {"temperature": 1.0, "task": "causal_lm", "device": "cpu"},
            unkeyed={"workers": workers, "teacher_device_map": device_map},
            seed=0,
            inputs={"teacher": "a" * 64, "data": "b" * 64},
        )
        place = self.folder / name
        (place / "output").mkdir(parents=True)
        store = open_store(str(place / "store"))
        return cache_teacher.work(
            Bench(
                order=order,
                inputs={role: self.folder / role for role in ("teacher", "data")},
                records={"teacher": SimpleNamespace(licence="none")},  # type: ignore[dict-item]
                scratch=place,
                output=place / "output",
                checkpoints=store.checkpoints(order.key),
                progress=progress,
                store_url=store.url,
            )
        )

    def files(self, name: str) -> dict[str, bytes]:
        output = self.folder / name / "output"
        return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    threads = torch.get_num_threads()
    yield Stage(tmp_path, tiny_llama(), token_rows(ROWS, 16, padding=3))
    torch.set_num_threads(threads)


@pytest.fixture
def made_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the pieces that this process makes, as it goes."""
    names: list[str] = []
    make = teacher_cache._make

    def noted(teacher: Any, plan: Any, name: str, *further: Any) -> None:
        names.append(name)
        make(teacher, plan, name, *further)

    monkeypatch.setattr(teacher_cache, "_make", noted)
    return names


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "tasks.cache_worker" in child.cmdline()
    ]


def test_two_workers_leave_the_same_bytes_as_none(stage: Stage, made_here: list[str]) -> None:
    alone = stage.run("alone", 1, rows_per_shard=8, audit_rows=1)
    assert len(made_here) == ROWS // 8 + 1
    made_here.clear()
    seen = []
    two = stage.run(
        "two", 2, lambda *report: seen.append(report[:2]), rows_per_shard=8, audit_rows=1
    )
    assert made_here == [], "the workers left something to the stage"
    assert stage.files("two") == stage.files("alone")
    assert two.metrics.pop("lost_workers") == 0
    assert two.metrics == alone.metrics
    assert (ROWS, ROWS) in seen
    assert workers() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_teacher_that_is_laid_out_leaves_the_same_bytes(stage: Stage, workers: int) -> None:
    stage.run("whole", 1, rows_per_shard=16)
    stage.run("laid out", workers, device_map="auto", rows_per_shard=16)
    assert stage.files("laid out") == stage.files("whole")


@pytest.mark.parametrize("lost", [1, 2])
def test_a_killed_worker_costs_one_shard(stage: Stage, made_here: list[str], lost: int) -> None:
    stage.run("alone", 1, rows_per_shard=1)
    made_here.clear()
    killed: list[int] = []

    def kill(done: int, total: int, unit: str, note: str = "") -> None:
        # The first report: one shard is done, the others are under way or free.
        if not killed and made_here == []:
            for worker in workers()[:lost]:
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)

    result = stage.run("killed", 2, kill, rows_per_shard=1)
    assert len(killed) == lost
    assert result.metrics["lost_workers"] == lost
    assert stage.files("killed") == stage.files("alone")
    # With one worker left, it makes all but what the other had claimed.
    assert len(made_here) <= 1 if lost == 1 else made_here
    assert workers() == []


def test_a_worker_killed_with_its_claim_leaves_that_piece_to_the_stage(
    stage: Stage, made_here: list[str]
) -> None:
    stage.run("alone", 1, rows_per_shard=1)
    made_here.clear()
    claims = stage.folder / "killed" / "store" / "partial"
    stopped: list[int] = []

    def stop_at_a_claim() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(claims.glob("*/claims/*/shard-*")):
                for worker in workers():
                    os.kill(worker.pid, signal.SIGKILL)
                    stopped.append(worker.pid)
                return
            time.sleep(0.001)

    watcher = threading.Thread(target=stop_at_a_claim)
    watcher.start()
    result = stage.run("killed", 2, rows_per_shard=1)
    watcher.join()
    assert result.metrics["lost_workers"] == len(stopped) == 2
    assert made_here, "what was claimed and not done is made here"
    assert stage.files("killed") == stage.files("alone")


def test_the_error_of_a_worker_is_the_stages(tmp_path: Path) -> None:
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = torch.nan
    stage = Stage(tmp_path, broken, token_rows(4, 16))
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        stage.run("broken", 2, rows_per_shard=1)
    assert workers() == []


def test_a_worker_that_dies_without_a_word_fails_the_stage(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.helpers.child_environment", lambda _: {"PYTHONHOME": "/none"})
    with pytest.raises(StageError, match="a worker of the teacher cache ended with code 1"):
        stage.run("dumb", 2, rows_per_shard=1)


def test_a_stopped_stage_ends_its_workers(stage: Stage) -> None:
    class Cancelled(Exception):
        pass

    def cancel(*_: Any, **__: Any) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        stage.run("cancelled", 2, cancel, rows_per_shard=1)
    assert workers() == []


def test_a_piece_is_claimed_once_a_run(tmp_path: Path) -> None:
    backend = open_store(str(tmp_path)).backend
    key = "a" * 64
    first, second, later = (StoreClaims(backend, key, run) for run in ("1", "1", "2"))
    assert first.take("shard-00000")
    assert not second.take("shard-00000")
    assert second.take("shard-00001")
    assert later.take("shard-00000")
    assert first.taken() == ["shard-00000", "shard-00001"]
    store = open_store(str(tmp_path))
    assert store.checkpoints(key).names() == []
    store.discard_checkpoints(key)
    assert first.taken() == []
