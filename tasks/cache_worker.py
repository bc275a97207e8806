"""The process that makes shards of a teacher cache: `python -m tasks.cache_worker FOLDER PARENT`.

FOLDER holds request.json. The worker takes the next piece that is neither done nor claimed, leaves
it among the checkpoints in the store, and says so on standard output, one JSON string a line. An
error is left as error.json. PARENT is the number of the stage's process, with which this one ends.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from stillroom.progress import silent
from stillroom.remote_code import trusting_code
from tasks.processes import answer, die_with_parent, importing, line_to_parent
from tasks.stages import Order
from tasks.store.claims import StoreClaims
from tasks.work.bench import Bench

if TYPE_CHECKING:
    from stillroom.distillation.teacher_cache import CapturePlan


class WorkerRequest(BaseModel):
    """What a worker is to do: the stage's order, its inputs where they lie, and its share."""

    model_config = ConfigDict(frozen=True)

    order: Order
    inputs: dict[str, Path]
    store_url: str
    run: str
    """The run of the stage to which the claims belong."""
    threads: int
    tokenizer_hash: str
    """The teacher's, so that it need not be loaded by each worker."""


def plan_capture(
    order: Order, inputs: dict[str, Path], tokenizer_hash: str | None = None
) -> "CapturePlan":
    """Return what the order asks of the teacher, whose tokenizer is loaded for its hash if need be.

    Raises:
        MismatchError: the rows were made with another tokenizer, or their labels are not those of
            a teacher that names classes.
        SourceError: it is to name classes, and has no head for that.
    """
    from stillroom.data.prepare import load_prepared
    from stillroom.distillation.teacher_cache import CacheOptions, CapturePlan
    from stillroom.labels import require_known_labels

    if tokenizer_hash is None:
        from stillroom import models

        tokenizer_hash = models.tokenizer_hash(models.load_tokenizer(inputs["teacher"]))
    section: dict[str, Any] = order.section
    options = CacheOptions(
        kind=section["kind"],
        head=section["head"],
        draws=section["draws"],
        temperature=section["temperature"],
        rows_per_shard=section["rows_per_shard"],
        batch_rows=section["batch_rows"],
        seed=order.seed,
        audit_rows=section["audit_rows"],
        hidden_states=section["hidden_states"],
    )
    data = load_prepared(inputs["data"])
    if data.train.label_names:
        require_known_labels(inputs["teacher"], data.train.label_names)
    return CapturePlan(
        data.evaluation if section.get("rows") == "evaluation" else data.train,
        options,
        tokenizer_hash,
        order.inputs["teacher"],
    )


def main(folder: Path, parent: int) -> int:
    """Do what request.json asks; return 0, or 3 where error.json says what went wrong."""
    die_with_parent(parent)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = WorkerRequest.model_validate_json((folder / "request.json").read_text())
    line = line_to_parent()

    def made(piece: str) -> None:
        line.write(json.dumps(piece) + "\n")
        line.flush()

    return answer(lambda: work(request, folder, made), request.order.title, folder)


def work(request: WorkerRequest, folder: Path, made: Callable[[str], None]) -> None:
    """Make pieces until all are done or claimed, and call `made` after each."""
    with importing():
        import torch

        from stillroom.distillation.teacher_cache import capture_pieces
        from tasks.store.store import open_store

    torch.set_num_threads(request.threads)
    store = open_store(request.store_url)
    plan = plan_capture(request.order, request.inputs, request.tokenizer_hash)
    checkpoints = store.checkpoints(request.order.key)
    claims = StoreClaims(store.backend, request.order.key, request.run)
    bench = Bench(
        order=request.order,
        inputs=request.inputs,
        records={},
        scratch=folder,
        output=folder,
        checkpoints=checkpoints,
        progress=silent,
    )
    with importing(), trusting_code(request.order.trusts_code):
        teacher = bench.load_teacher()
    names = _next_pieces(plan, set(checkpoints.names()), claims)
    capture_pieces(teacher, plan, names, checkpoints, made=made)


def _next_pieces(plan: "CapturePlan", done: set[str], claims: StoreClaims) -> Iterator[str]:
    return (name for name in plan.pieces if name not in done and claims.take(name))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
