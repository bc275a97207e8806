"""The process in which one stage works: `python -m tasks.child FOLDER [PARENT]`.

FOLDER holds request.json. The result is left there as record.json, an error as error.json.
Progress goes to standard output, one JSON list a line; logs go to standard error. PARENT is the
number of the flow's process, with which this one ends.
"""

import ctypes
import importlib
import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import stillroom.errors
from stillroom.errors import StillroomError
from stillroom.progress import Progress
from tasks.explain import explain
from tasks.stages import Order
from tasks.store.record import Record
from tasks.work.bench import Bench

FAILED = 3
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Request(BaseModel):
    """What the child is to do."""

    model_config = ConfigDict(frozen=True)

    order: Order
    records: dict[str, Record]
    store_url: str
    threads: int


def main(folder: Path, parent: int | None = None) -> int:
    """Do what request.json asks; return 0, or 3 where error.json says what went wrong."""
    _die_with_parent(parent)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = Request.model_validate_json((folder / "request.json").read_text())
    progress = _Reporter()
    try:
        record = work(request, folder, progress)
    except Exception as error:
        explained = explain(error, request.order.title)
        if explained is None:
            raise
        logging.getLogger(__name__).info("the work ended early", exc_info=error)
        answer = {"type": type(explained).__name__, "message": str(explained)}
        (folder / "error.json").write_text(json.dumps(answer))
        return FAILED
    (folder / "record.json").write_text(record.model_dump_json())
    return 0


def work(request: Request, folder: Path, progress: Progress) -> Record:
    """Fetch the inputs, do the work, and store what came of it."""
    import torch

    from tasks.store.store import open_store

    torch.set_num_threads(request.threads)
    started = time.monotonic()
    order, store = request.order, open_store(request.store_url)
    with store.lease(order.key):
        inputs = {
            role: store.fetch(record, folder / "inputs" / role)
            for role, record in request.records.items()
        }
        output = folder / "output"
        output.mkdir()
        bench = Bench(
            order=order,
            inputs=inputs,
            records=request.records,
            scratch=folder,
            output=output,
            checkpoints=store.checkpoints(order.key),
            progress=progress,
        )
        result = importlib.import_module(order.stage.work).work(bench)
        spent = {"seconds": time.monotonic() - started, "peak_memory_bytes": _peak_memory()}
        record = store.add(
            output,
            kind=order.kind,
            key=order.key,
            stage_version=order.stage.version,
            inputs=order.inputs | {role: s.identity for role, s in order.sources.items()},
            section=order.section,
            versions=versions(),
            licence=result.licence,
            metrics=result.metrics | spent,
        )
    store.discard_checkpoints(order.key)
    return record


def versions() -> dict[str, str]:
    """Return the full versions of what did the work."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "safetensors", "peft")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}


def error_from(file: Path) -> StillroomError:
    """Return the error that a child left in error.json."""
    answer = json.loads(file.read_text())
    kind = getattr(stillroom.errors, answer["type"], StillroomError)
    error = kind(answer["message"])
    assert isinstance(error, StillroomError)
    return error


class _Reporter:
    """Writes progress for the parent, a few times a second at most."""

    def __init__(self) -> None:
        self.last = 0.0
        # Whatever a library prints must not mix with the progress: it goes to the log.
        self.pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self.last < 0.2:
            return
        self.last = now
        self.pipe.write(json.dumps([done, total, unit, note]) + "\n")
        self.pipe.flush()


def _peak_memory() -> int:
    """Return the most bytes this process has held."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _die_with_parent(parent: int | None) -> None:
    """End when the flow's process is killed: a rerun must not meet its own ghost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        # It may have been killed before anyone asked to hear of it.
        if parent is not None and os.getppid() != parent:
            sys.exit(FAILED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
