"""Several processes that make the pieces of one teacher cache, through the store's checkpoints."""

import json
import logging
import os
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

from stillroom.distillation.teacher_cache import CapturePlan
from stillroom.errors import StageError
from tasks.cache_worker import WorkerRequest
from tasks.processes import FAILED, child_environment, end_child, error_from, last_line
from tasks.work.bench import Bench

_log = logging.getLogger(__name__)


def share_capture(bench: Bench, plan: CapturePlan, workers: int, threads: int) -> int:
    """Have `workers` processes of `threads` threads make the pieces that are missing.

    Returns how many of them were killed. What a killed worker had claimed stays missing, one piece
    at most; the others go on with the rest.

    Raises:
        StillroomError: whatever the work of a worker raised; the others are ended.
        StageError: a worker ended without a word.
    """
    done = set(bench.checkpoints.names())
    missing = [name for name in plan.pieces if name not in done]
    request = WorkerRequest(
        order=bench.order,
        inputs=bench.inputs,
        store_url=bench.store_url,
        run=uuid.uuid4().hex,
        threads=threads,
    )
    folders = [bench.scratch / f"worker-{i}" for i in range(min(workers, len(missing)))]
    with ExitStack() as stack:
        # One pipe for all: it ends when the last of them has ended, however that was.
        reading, writing = os.pipe()
        lines = stack.enter_context(os.fdopen(reading))
        try:
            children = [stack.enter_context(_Worker(each, request, writing)) for each in folders]
        finally:
            os.close(writing)
        rows = sum(_rows(plan, name) for name in done & plan.pieces.keys())
        for line in lines:
            rows += _rows(plan, json.loads(line))
            bench.progress(rows, len(plan.examples), "rows", f"{len(children)} workers")
            # The error of one is not kept back until the others have ended.
            for child in children:
                if child.failed:
                    child.close()
        return sum(child.close() for child in children)


def _rows(plan: CapturePlan, piece: str) -> int:
    # The audit's rows are asked once more, and are no progress.
    rows = plan.pieces[piece]
    return rows.stop - rows.start if piece.startswith("shard-") else 0


class _Worker:
    """One process, which is ended with the block, whatever happens."""

    def __init__(self, folder: Path, request: WorkerRequest, writing: int) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "request.json").write_text(request.model_dump_json())
        with (folder / "stderr.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.cache_worker", str(folder), str(os.getpid())],
                stdout=writing,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=child_environment(request.threads),
                text=True,
            )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        end_child(self.process)

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error; one that was killed has not failed, it is lost."""
        return (self.process.poll() or 0) > 0

    def close(self) -> bool:
        """Wait for the end of the process; return whether it was killed.

        Raises:
            StillroomError: what its work raised.
            StageError: it ended without a word.
        """
        code = self.process.wait()
        if code == FAILED and (self.folder / "error.json").exists():
            raise error_from(self.folder / "error.json")
        if code > 0:
            said = last_line(self.folder / "stderr.log")
            raise StageError(f"a worker of the teacher cache ended with code {code}: {said}")
        if code < 0:
            _log.warning(
                "a worker of the teacher cache was killed by signal %d, perhaps because memory ran "
                "out; the others go on, and what it had begun is made again",
                -code,
            )
        return code < 0
