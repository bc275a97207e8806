"""Several processes that make the pieces of one teacher cache, through the store's checkpoints."""

import json
import logging
import os
import uuid
from contextlib import ExitStack

from stillroom.distillation.teacher_cache import CapturePlan
from tasks.cache_worker import WorkerRequest
from tasks.helpers import Helper
from tasks.work.bench import Bench

TITLE = "a worker of the teacher cache"

_log = logging.getLogger(__name__)


def share_capture(
    bench: Bench, plan: CapturePlan, workers: int, threads: int, run: str | None = None
) -> int:
    """Have `workers` processes of `threads` threads make the pieces that are missing.

    `run` is shared by those who work on the same cache at the same time: what one has claimed, no
    other takes. Returns how many processes were killed. What a killed worker had claimed stays
    missing, one piece at most; the others go on with the rest.

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
        run=run or uuid.uuid4().hex,
        threads=threads,
        tokenizer_hash=plan.tokenizer_hash,
    )
    folders = [bench.scratch / f"worker-{i}" for i in range(min(workers, len(missing)))]
    with ExitStack() as stack:
        # One pipe for all: it ends when the last of them has ended, however that was.
        reading, writing = os.pipe()
        lines = stack.enter_context(os.fdopen(reading))
        try:
            children = [
                stack.enter_context(
                    Helper(TITLE, "tasks.cache_worker", folder, request, threads, stdout=writing)
                )
                for folder in folders
            ]
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
        return sum(_lost(child) for child in children)


def _rows(plan: CapturePlan, piece: str) -> int:
    # The audit's rows are asked once more, and are no progress.
    rows = plan.pieces[piece]
    return rows.stop - rows.start if piece.startswith("shard-") else 0


def _lost(worker: Helper) -> bool:
    """Wait for the end of a worker, and return whether it was killed."""
    signal = worker.close()
    if signal:
        _log.warning(
            "%s was killed by signal %d, perhaps because memory ran out; the others go on, and "
            "what it had begun is made again",
            worker.title,
            signal,
        )
    return signal > 0
