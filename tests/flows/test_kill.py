"""kill -9 in the middle of a long stage: the same command goes on, and makes the same bytes."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from stillroom.cli import main as stillroom
from tasks.store.partial import StoreCheckpoints
from tasks.store.record import Record
from tests.flows.terminal import Terminal, assert_done, assert_refused, assert_sound
from tests.stage_processes import is_stage

pytestmark = pytest.mark.integration
Open = Callable[..., Terminal]
Recipe = dict[str, Any]
WAIT_SECONDS = 90

TEACHER_CACHE, STUDENT, QUANTIZED = "cache teacher", "distil student", "quantize"
BEFORE = ("import teacher", "prepare data")


class Pieces:
    """The checkpoints of one stage, as they lie on the disk: piece to the attempt that wrote it."""

    def __init__(self, user: Terminal, key: str) -> None:
        self.checkpoints = StoreCheckpoints(user.store.backend, key)
        self.folder = user.home / "store" / "partial" / key

    def names(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.json"))

    def attempts(self) -> dict[str, str]:
        found = {}
        for name in self.names():
            piece = self.checkpoints.piece(name)
            if piece is not None:  # removed since it was listed
                found[name] = piece.attempt
        return found


def made(user: Terminal, title: str) -> Record:
    """Return what the stage made."""
    by_title = {
        TEACHER_CACHE: lambda record: record.kind == "teacher-cache",
        STUDENT: lambda record: "soft_weight" in record.section,
        QUANTIZED: lambda record: "group_size" in record.section,
    }
    (record,) = [record for record in user.store.records() if by_title[title](record)]
    return record


def kill_in_the_middle(user: Terminal, pieces: Pieces) -> None:
    """Start the command, and kill its process when its stage has its first checkpoints."""
    with (user.folder / "killed.log").open("wb") as log:
        flow = subprocess.Popen(
            user.command("compress", "recipe.yaml"),
            cwd=user.folder,
            env=user.environment(),
            stdout=log,
            stderr=log,
        )
    try:
        _until(lambda: len(pieces.names()) >= 2 or flow.poll() is not None, pause=0.0005)
        stages = list(filter(is_stage, psutil.Process(flow.pid).children(recursive=True)))
        os.kill(flow.pid, signal.SIGKILL)
    finally:
        flow.kill()
        flow.wait(WAIT_SECONDS)
    assert flow.returncode == -signal.SIGKILL, (user.folder / "killed.log").read_text()
    assert stages, "the stage had ended already"
    # A stage dies with its flow: a rerun must not meet it.
    _until(lambda: not any(map(is_stage, stages)))


def _until(condition: Callable[[], bool], pause: float = 0.02) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)


class Watch:
    """Looks at the checkpoints while a command runs."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.seen: set[tuple[str, str]] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.002):
            self.seen |= set(self.pieces.attempts().items())


@pytest.mark.parametrize("title", [TEACHER_CACHE, STUDENT, QUANTIZED])
def test_a_killed_run_goes_on_to_the_same_bytes(
    terminal: Open, finished: Terminal, recipe: Recipe, title: str
) -> None:
    user = terminal(like=finished)
    user.write(recipe)
    whole = made(finished, title)
    user.forget(whole)
    pieces = Pieces(user, whole.key)
    kill_in_the_middle(user, pieces)
    before = pieces.attempts()
    assert before, "no checkpoint was left"
    assert user.store.find(whole.kind, whole.key) is None
    assert user.versions() == 0
    assert_sound(user)

    with Watch(pieces) as watch:
        done = user.compress()
    assert_done(done, tuple({*BEFORE, TEACHER_CACHE, STUDENT, QUANTIZED} - {title}))
    # What had been finished was not done again, and what had not been was.
    last = max(before)
    repeated = {
        name for name, attempt in watch.seen if name <= last and attempt not in before.values()
    }
    assert repeated == set()
    assert any(name > last for name, _ in watch.seen)
    assert made(user, title).files == whole.files
    assert pieces.names() == []
    assert user.versions() == 1
    assert_sound(user)


def test_one_of_two_workers_is_killed_and_the_run_goes_on(
    terminal: Open, finished: Terminal, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    user = terminal(like=finished)
    del recipe["quantization"]
    # How many work is no part of the key: the artifact is the one that one process made.
    recipe["execution"] = {"threads": 2, "cache_workers": 2}
    user.write(recipe)
    whole = made(finished, TEACHER_CACHE)
    user.forget(whole)
    pieces = Pieces(user, whole.key)
    killed: list[int] = []

    def kill_a_worker() -> None:
        _until(lambda: len(pieces.names()) >= 2, pause=0.0005)
        for process in psutil.process_iter(["cmdline", "environ"]):
            home = (process.info["environ"] or {}).get("STILLROOM_HOME")
            if "tasks.cache_worker" in (process.info["cmdline"] or ()) and home == str(user.home):
                process.kill()
                killed.append(process.pid)
                return

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    done = user.compress()
    killer.join()
    assert_done(done, (*BEFORE, STUDENT))
    assert len(killed) == 1
    again = made(user, TEACHER_CACHE)
    assert again.metrics["lost_workers"] == 1
    assert again.files == whole.files
    assert pieces.names() == []
    assert_sound(user)

    fetched = user.type("store", "fetch", again.key[:12], "cache")
    assert fetched.returncode == 0, fetched.stderr
    assert stillroom(["inspect", str(user.folder / "cache")]) == 0
    assert "sampled teacher cache: head 2, draws 16" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_repaired(
    terminal: Open, finished: Terminal, recipe: Recipe
) -> None:
    user = terminal(like=finished)
    del recipe["quantization"]
    user.write(recipe)
    whole = made(finished, TEACHER_CACHE)
    user.forget(whole)
    pieces = Pieces(user, whole.key)
    kill_in_the_middle(user, pieces)
    first = next(
        (pieces.folder / "files" / pieces.attempts()[pieces.names()[0]]).glob("*.safetensors")
    )
    _flip(first)
    assert_refused(user.compress(), "is not the file that was saved", "store verify --repair")
    assert user.type("store", "verify", "--repair").returncode == 1
    assert_done(user.compress(), (*BEFORE, STUDENT))
    assert made(user, TEACHER_CACHE).files == whole.files


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
