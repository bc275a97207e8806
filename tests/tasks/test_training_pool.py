"""A stage that trains with several processes: the same student, and no hang where one is lost."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stillroom.config import Distillation, Recipe
from stillroom.data.prepare import PreparedData, save_prepared
from stillroom.errors import StageError
from stillroom.models import save_model, tokenizer_hash
from stillroom.progress import silent
from tasks.child import Request
from tasks.run_child import run_child
from tasks.stages import DISTILL_STUDENT, Order, as_json
from tasks.store.store import open_store
from tests.stage_processes import command_of
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer


class Stage:
    """A teacher and rows in a store; `run` has a child train a student on the rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(str(folder / "store"))
        tokenizer = tiny_tokenizer()
        save_model(tiny_llama(layers=3), tokenizer, folder / "teacher")
        rows = replace(token_rows(16), tokenizer_hash=tokenizer_hash(tokenizer))
        save_prepared(PreparedData(rows, rows, rows, {}), folder / "data")
        self.records = {
            role: self.store.add(
                folder / role,
                kind=kind,
                key=letter * 64,
                stage_version=1,
                inputs={},
                section={},
                versions={},
                licence="none",
                metrics={},
            )
            for role, kind, letter in (("teacher", "model", "a"), ("data", "dataset", "b"))
        }

    def run(self, seed: int, processes: int, parallel: str, steps: int, progress: Any) -> Any:
        section = Distillation.model_validate(
            {
                "student": {"layers": 2},
                "soft_weight": 0,
                "hard_weight": 1,
                "training": {
                    "steps": steps,
                    "batch_rows": 2,
                    "gradient_accumulation": 2,
                    "checkpoint_every_steps": 5,
                },
            }
        )
        order = Order(
            title="distil student",
            stage=DISTILL_STUDENT,
            section=as_json(section, "cache", "preset") | {"task": "causal_lm", "device": "cpu"},
            unkeyed={"processes": processes, "parallel": parallel},
            seed=seed,
            inputs={role: record.key for role, record in self.records.items()},
        )
        request = Request(order=order, records=self.records, store_url=self.store.url, threads=2)
        return run_child(request, self.folder / "scratch", progress)

    def weights(self, record: Any, name: str) -> dict[str, torch.Tensor]:
        folder = self.store.fetch(record, self.folder / name)
        return load_file(folder / "model.safetensors")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_student_that_one_makes(stage: Stage, parallel: str) -> None:
    one = stage.run(0, 1, "ddp", 4, silent)
    alone = stage.weights(one, "alone")
    stage.store.forget(one)
    record = stage.run(0, 2, parallel, 4, silent)
    together = stage.weights(record, "together")
    assert record.metrics["steps"] == 4
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_lost_process_is_named_and_a_rerun_goes_on(stage: Stage) -> None:
    def kill(done: int, total: int, unit: str, note: str = "") -> None:
        if done >= 6:
            for process in psutil.Process(os.getpid()).children(recursive=True):
                if "tasks.training_member" in command_of(process):
                    process.send_signal(signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(StageError, match=r"process 1 was killed by signal 9.*run again"):
        stage.run(1, 2, "ddp", 100_000, kill)
    assert time.monotonic() - began < 100
    left = map(command_of, psutil.Process(os.getpid()).children(recursive=True))
    assert not [line for line in left if "tasks.training_member" in line]
    seen: list[int] = []

    def stop(done: int, total: int, unit: str, note: str = "") -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(1, 2, "ddp", 100_000, stop)
    assert seen[0] >= 6


def test_a_recipe_whose_batches_cannot_be_dealt_out_is_refused() -> None:
    recipe = {
        "name": "x",
        "teacher": {"source": "y"},
        "data": {"train": {"source": "z"}},
        "distillation": {"training": {"gradient_accumulation": 3}},
        "execution": {"training_processes": 2},
    }
    with pytest.raises(ValueError, match=r"distillation.training.gradient_accumulation: 3 batches"):
        Recipe.model_validate(recipe)
    recipe["distillation"] = {"training": {"gradient_accumulation": 4}}
    Recipe.model_validate(recipe)
