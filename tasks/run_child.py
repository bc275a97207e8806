"""Run a stage in a child process, pass its progress on, and say plainly how it ended."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stillroom.errors import OutOfMemoryError, StageError, StoreError
from stillroom.progress import Progress
from stillroom.redaction import redact
from tasks.child import Request
from tasks.forks import can_fork, fork_stage
from tasks.processes import FAILED, child_environment, end_child, error_from, last_line
from tasks.store.record import Record


def run_child(request: Request, scratch_root: Path, progress: Progress) -> Record:
    """Return the record of the artifact that the child stored.

    Raises:
        StillroomError: whatever the child's work raised.
        OutOfMemoryError: the child was killed.
        StageError: it ended without a word.
    """
    with scratch_folder(scratch_root) as folder:
        (folder / "request.json").write_text(request.model_dump_json())
        code = _run(folder, request.threads, progress)
        if code == 0:
            return Record.model_validate_json((folder / "record.json").read_text())
        title = request.order.title
        if code == FAILED and (folder / "error.json").exists():
            raise error_from(folder / "error.json")
        if code == -signal.SIGKILL:
            raise OutOfMemoryError(
                f"{title} was killed by the operating system, most likely because memory ran out. "
                "Its finished part is kept: run again with fewer batch_rows or a shorter "
                "sequence_length, or on a larger machine"
            )
        log = _keep_log(folder, scratch_root / "logs" / f"{request.order.key[:12]}.log")
        raise StageError(f"{title} ended with code {code}: {last_line(log)}; its log is {log}")


def _keep_log(folder: Path, log: Path) -> Path:
    log.parent.mkdir(exist_ok=True)
    log.write_text(redact((folder / "stderr.log").read_text(errors="replace")))
    return log


def _run(folder: Path, threads: int, progress: Progress) -> int:
    start = fork_stage if can_fork() else _start
    with (folder / "stderr.log").open("wb") as log, start(folder, threads, log) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                done, total, unit, note = json.loads(line)
                progress(done, total, unit, note)
            return child.wait()
        finally:
            end_child(child)


def _start(folder: Path, threads: int, log: BinaryIO) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.child", str(folder), str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env=child_environment(threads),
        text=True,
    )


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """Make a folder for one stage's work, and clear away those of processes that are gone."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.iterdir():
            owner = old.name.partition("-")[0]
            if owner.isdigit() and not _alive(int(owner)):
                shutil.rmtree(old, ignore_errors=True)
        folder = root / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise StoreError(
            f"no work folder can be made in {root}: {error.strerror}; set "
            "STILLROOM_HOME or STILLROOM_SCRATCH to a folder that can be written"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
