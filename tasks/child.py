"""The process in which one stage works: `python -m tasks.child FOLDER [PARENT]`.

FOLDER holds request.json. The result is left there as record.json, an error as error.json.
Progress goes to standard output, one JSON list a line; logs go to standard error. PARENT is the
number of the flow's process, with which this one ends.
"""

import importlib
import json
import logging
import resource
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from stillroom.errors import StillroomError
from stillroom.progress import Progress
from stillroom.remote_code import copy_code, trusting_code
from tasks.processes import answer, die_with_parent, importing, line_to_parent
from tasks.quiet_logs import hide_secrets_in_logs
from tasks.stages import Order
from tasks.store.record import Record
from tasks.training_pool import training_team
from tasks.work.bench import Bench


class Request(BaseModel):
    """What the child is to do."""

    model_config = ConfigDict(frozen=True)

    order: Order
    records: dict[str, Record]
    store_url: str
    threads: int


def main(folder: Path, parent: int | None = None) -> int:
    """Do what request.json asks; return 0, or 3 where error.json says what went wrong."""
    die_with_parent(parent)
    hide_secrets_in_logs()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = Request.model_validate_json((folder / "request.json").read_text())
    progress = _Reporter()

    def store_record() -> None:
        record = work(request, folder, progress)
        (folder / "record.json").write_text(record.model_dump_json())

    return answer(store_record, request.order.title, folder)


def work(request: Request, folder: Path, progress: Progress) -> Record:
    """Fetch the inputs, do the work, and store what came of it."""
    with importing():
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
            store_url=request.store_url,
        )
        if order.trusts_code and order.kind == "model":
            for taken in inputs.values():
                copy_code(taken, output)
        try:
            with training_team(bench), trusting_code(order.trusts_code):
                with importing():
                    stage = importlib.import_module(order.stage.work)
                result = stage.work(bench)
        except StillroomError:
            # A faster run of the same stage takes away the checkpoints, which this one may read.
            if found := store.find(order.kind, order.key):
                return found
            raise
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


class _Reporter:
    """Writes progress for the parent, a few times a second at most."""

    def __init__(self) -> None:
        self.last = 0.0
        self.pipe = line_to_parent()

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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
