"""Two processes that train one model: as one process would have, whichever way they share it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import RecipeError
from stillroom.fine_tuning import fine_tune
from tests.stillroom.training.team_member import (
    EXAMPLES,
    FEW_WORDS,
    OPTIONS,
    OTHERS,
    PATIENT,
    model,
)

MEMBER = [sys.executable, "-W", "ignore", "-m", "tests.stillroom.training.team_member"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_team(folder, kind, parallel, *further):
    """Train with two processes; return what each left, as a dict of its files."""
    port = free_port()
    members = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        command = [*MEMBER, str(folder), kind, parallel, *further]
        members.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    errors = [member.communicate(timeout=120)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def parameters(folder, rank):
    return load_file(folder / f"{rank}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["llama", "bert", "lora"])
def test_two_processes_end_as_one_does(tmp_path: Path, kind: str, parallel: str) -> None:
    alone = model(kind)
    history = fine_tune(alone, EXAMPLES[kind], OPTIONS, evaluation=EXAMPLES[kind])
    first, second = run_team(tmp_path, kind, parallel)
    assert first == second
    assert first["steps"] == history.steps
    assert first["loss"] == pytest.approx(history.loss, rel=1e-4)
    assert first["gradient_norm"] == pytest.approx(history.gradient_norm, rel=1e-3)
    held_out = history.evaluations["held_out_cross_entropy_nats"]
    assert first["evaluations"]["held_out_cross_entropy_nats"] == pytest.approx(held_out, rel=1e-4)
    one, other = parameters(tmp_path, 0), parameters(tmp_path, 1)
    expected = dict(alone.named_parameters())
    assert one.keys() == other.keys() == expected.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name])
        # Softmax does not see the keys' bias: its gradient is rounding, which Adam blows up.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, expected[name].detach(), rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_team_goes_on_where_one_process_stopped(tmp_path: Path, parallel: str) -> None:
    # And the other way round: what is shared out is saved whole.
    alone = model("llama")
    fine_tune(alone, EXAMPLES["llama"], OPTIONS, evaluation=EXAMPLES["llama"])
    run_team(tmp_path, "llama", parallel, "3")
    assert FolderCheckpoints(tmp_path / "checkpoints").names() == ["step-00000002"]
    resumed = model("llama")
    history = fine_tune(
        resumed,
        EXAMPLES["llama"],
        OPTIONS,
        evaluation=EXAMPLES["llama"],
        checkpoints=FolderCheckpoints(tmp_path / "checkpoints"),
    )
    assert len(history.steps) == OPTIONS.steps
    run_team(tmp_path, "llama", parallel)
    for found in (dict(resumed.named_parameters()), parameters(tmp_path, 0)):
        for name, expected in alone.named_parameters():
            torch.testing.assert_close(
                found[name].detach(), expected.detach(), rtol=2e-3, atol=2e-4
            )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_team_without_checkpoints_keeps_the_best(tmp_path: Path, parallel: str) -> None:
    alone = model("llama")
    history = fine_tune(alone, FEW_WORDS, PATIENT, evaluation=OTHERS)
    assert 1 < history.best_step < len(history.steps) < PATIENT.steps
    first, second = run_team(tmp_path, "llama", parallel, "patient")
    assert first == second
    assert first["best_step"] == history.best_step
    one, other = parameters(tmp_path, 0), parameters(tmp_path, 1)
    for name, expected in alone.named_parameters():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], expected.detach(), rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_both(tmp_path: Path) -> None:
    for each in run_team(tmp_path, "llama", "fsdp", "nan"):
        assert "step 2: the loss is nan" in each["error"]
    # The parameters are those of the step before, and whole.
    one = model("llama")
    assert parameters(tmp_path, 1).keys() == dict(one.named_parameters()).keys()


def test_a_step_must_be_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillroom.training import loop
    from stillroom.training.team import Team

    class Two:
        def __enter__(self):
            return Team(0, 2, llama, llama)

        def __exit__(self, *error):
            pass

    llama = model("llama")
    monkeypatch.setattr(loop, "joined", lambda *_: Two())
    with pytest.raises(RecipeError, match="3 batches cannot be dealt out evenly to 2 processes"):
        fine_tune(llama, EXAMPLES["llama"], replace(OPTIONS, gradient_accumulation=3))
