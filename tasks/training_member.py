"""A process that trains a model with others: `python -m tasks.training_member FOLDER PARENT`.

FOLDER holds request.json; the environment says where the others are, as for any process of
`torch.distributed`. An error is left as error.json. PARENT is the number of the stage's process,
with which this one ends.
"""

import importlib
import logging
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from stillroom.progress import silent
from stillroom.remote_code import trusting_code
from tasks.processes import answer, die_with_parent, importing
from tasks.stages import Order
from tasks.store.record import Record
from tasks.work.bench import Bench


class MemberRequest(BaseModel):
    """What a further process is to do: the stage's work on the same inputs."""

    model_config = ConfigDict(frozen=True)

    order: Order
    inputs: dict[str, Path]
    records: dict[str, Record]
    store_url: str
    threads: int
    rank: int


def main(folder: Path, parent: int) -> int:
    """Do what request.json asks; return 0, or 3 where error.json says what went wrong."""
    die_with_parent(parent)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    request = MemberRequest.model_validate_json((folder / "request.json").read_text())
    return answer(lambda: work(request, folder), request.order.title, folder)


def work(request: MemberRequest, folder: Path) -> None:
    """Train; what comes of it is the first process's to keep."""
    with importing():
        import torch

        from tasks.store.store import open_store

    torch.set_num_threads(request.threads)
    order = request.order
    output = folder / "output"
    output.mkdir()
    bench = Bench(
        order=order,
        inputs=request.inputs,
        records=request.records,
        scratch=folder,
        output=output,
        checkpoints=open_store(request.store_url).checkpoints(order.key),
        progress=silent,
        store_url=request.store_url,
        rank=request.rank,
    )
    with importing():
        stage = importlib.import_module(order.stage.work)
    with trusting_code(order.trusts_code):
        stage.work(bench)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
