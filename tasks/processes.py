"""How a process of ours is started, talks to its parent, says what went wrong, and is ended."""

import ctypes
import gc
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

import stillroom.errors
from stillroom.errors import StillroomError
from stillroom.redaction import redact
from tasks.explain import explain

ROOT = Path(__file__).parents[1]
FAILED = 3
GRACE_SECONDS = 5
PARENT_DEATH_SIGNAL, NAME = 1, 15  # PR_SET_PDEATHSIG and PR_SET_NAME of prctl(2)


class Process(Protocol):
    """A process as `subprocess` gives it, or a forked one."""

    def poll(self) -> int | None:
        """Return the exit code, or the signal as a negative number; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return what `poll` does, at its end; TimeoutExpired after so many seconds."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


def child_environment(threads: int) -> dict[str, str]:
    """Return this process's environment, for a child that computes on so many threads."""
    paths = [str(ROOT), str(ROOT / "compression"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
        # Threads without work wait asleep: by default they burn 10 ms of a processor each time.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def end_child(child: Process) -> None:
    """End a child where the work was cancelled; its checkpoints stay."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def die_with_parent(parent: int | None) -> None:
    """End when the parent is killed: a rerun must not meet its own ghost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        # It may have been killed before anyone asked to hear of it.
        if parent is not None and os.getppid() != parent:
            sys.exit(FAILED)


def set_title(title: str) -> None:
    """Have `ps` and `top` show this process by another name than its parent's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(NAME, title.encode())


@contextmanager
def importing() -> Iterator[None]:
    """Import what is large in here: modules stay, and are not looked through for garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def line_to_parent() -> TextIO:
    """Return the standard output, for the parent alone: what a library prints goes to the log."""
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return line


def leave_error(error: Exception, title: str, folder: Path) -> bool:
    """Leave in error.json what the user can act on; return False for a fault of ours."""
    explained = explain(error, title)
    if explained is None:
        return False
    logging.getLogger(__name__).info("the work ended early", exc_info=error)
    answer = {"type": type(explained).__name__, "message": str(explained)}
    (folder / "error.json").write_text(json.dumps(answer))
    return True


def answer(work: Callable[[], None], title: str, folder: Path) -> int:
    """Do the work of a child; return 0, or 3 where error.json says what went wrong."""
    try:
        work()
    except Exception as error:
        if not leave_error(error, title, folder):
            raise
        return FAILED
    return 0


def error_from(file: Path) -> StillroomError:
    """Return the error that a child left in error.json."""
    answer = json.loads(file.read_text())
    kind = getattr(stillroom.errors, answer["type"], StillroomError)
    error = kind(answer["message"])
    assert isinstance(error, StillroomError)
    return error


def last_line(log: Path) -> str:
    """Return the last line of a child's log, shortened, without secrets."""
    lines = redact(log.read_text(errors="replace")).strip().splitlines() or ["it said nothing"]
    return lines[-1][:300]
