"""Stages as forks: that they begin at once, and that none outlives what it was made for."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tasks import forks
from tasks.forks import ForkedStage, can_fork, fork_stage
from tasks.processes import FAILED, end_child
from tests.stage_processes import is_fork_server, is_stage

WAIT_SECONDS = 60
pytestmark = pytest.mark.skipif(not can_fork(), reason="stages are not forked here")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Callable[[], ForkedStage]]:
    """Begin stages that wait for their request, which nobody writes."""
    begun: list[ForkedStage] = []

    def begin() -> ForkedStage:
        begun.append(waiting_stage(tmp_path / f"stage-{len(begun)}"))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()
        each.wait()
        each.__exit__()


def waiting_stage(folder: Path) -> ForkedStage:
    folder.mkdir()
    os.mkfifo(folder / "request.json")
    with (folder / "stderr.log").open("wb") as log:
        return fork_stage(folder, 1, log)


def below_us() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def stages() -> list[psutil.Process]:
    return list(filter(is_stage, below_us()))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stage_begins_at_once_where_another_was(stage: Callable[[], ForkedStage]) -> None:
    stage()
    until(lambda: len(stages()) == 1)
    began = time.monotonic()
    stage()
    until(lambda: len(stages()) == 2)
    assert time.monotonic() - began < 1  # importing takes a processor some five
    assert len({process.ppid() for process in stages()}) == 1


def test_what_is_forked_has_one_thread(stage: Callable[[], ForkedStage]) -> None:
    # Of several threads, a fork has one, and the locks that the others held.
    stage()
    until(lambda: bool(stages()))
    (server,) = {process.parent() for process in stages()}
    assert server is not None
    assert server.num_threads() == 1


def test_a_stage_is_ended_as_any_child(stage: Callable[[], ForkedStage]) -> None:
    waiting = stage()
    until(lambda: bool(stages()))
    assert waiting.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.1)
    end_child(waiting)
    assert waiting.poll() == -signal.SIGTERM
    assert stages() == []


def test_what_is_cancelled_before_it_began_never_begins(
    stage: Callable[[], ForkedStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_HOME", "/elsewhere")  # so that a server begins
    cancelled = stage()
    assert stages() == []
    end_child(cancelled)
    assert cancelled.poll() == -signal.SIGTERM
    stage()
    until(lambda: bool(stages()))
    assert len(stages()) == 1


def test_a_stage_ends_with_whoever_waits_for_it(tmp_path: Path) -> None:
    with waiting_stage(tmp_path / "abandoned"):
        until(lambda: bool(stages()))
    until(lambda: stages() == [])


def test_stages_end_with_what_they_were_forked_from(stage: Callable[[], ForkedStage]) -> None:
    lost = stage()
    until(lambda: bool(stages()))
    (server,) = filter(None, {process.parent() for process in stages()})
    server.kill()
    assert lost.wait(WAIT_SECONDS) == -signal.SIGKILL
    until(lambda: stages() == [])
    stage()  # of another server
    until(lambda: bool(stages()))


def test_another_environment_is_another_servers(
    stage: Callable[[], ForkedStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = stage()
    until(lambda: bool(stages()))
    end_child(ended)
    monkeypatch.setenv("STILLROOM_HOME", "/another")
    stage()
    until(lambda: bool(stages()))
    assert [each.environ()["STILLROOM_HOME"] for each in stages()] == ["/another"]
    until(lambda: len(list(filter(is_fork_server, below_us()))) == 1)


def test_what_went_wrong_before_the_first_stage_is_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken here')")
    found = dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    monkeypatch.setattr(forks, "child_environment", lambda threads: found)
    with (tmp_path / "log").open("wb") as log, fork_stage(tmp_path, 1, log) as stage:
        assert stage.wait(WAIT_SECONDS) == 1 != FAILED
    assert "torch is broken here" in (tmp_path / "log").read_text()
