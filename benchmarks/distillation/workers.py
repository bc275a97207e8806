"""The teacher's outputs by one process and by two, of one thread each."""

import shutil
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.claims import at_most, write_measure
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import teacher_folder, train_rows
from benchmarks.text import text_source
from stillroom.config import Distillation
from stillroom.data.prepare import PreparedData, save_prepared
from stillroom.progress import silent
from tasks.stages import CACHE_TEACHER, Order, as_json
from tasks.store.store import open_store
from tasks.work import cache_teacher
from tasks.work.bench import Bench

ROWS = 768
ROUNDS = 3


def measure_workers() -> None:
    """Time the stage with one worker and with two in turn; the start of the processes counts.

    A round compares the two in the same minutes: machines are not as fast in the next.
    """
    threads = torch.get_num_threads()
    folder = bench_folder() / "workers"
    shutil.rmtree(folder, ignore_errors=True)
    rows = train_rows(ROWS)
    folder.mkdir(parents=True)
    save_prepared(PreparedData(rows, rows, rows, {}), folder / "data")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    try:
        for number in range(ROUNDS):
            for workers, found in seconds.items():
                torch.set_num_threads(workers)
                began = time.perf_counter()
                _capture(folder / f"{number}-with-{workers}", workers)
                found.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    text = "seconds of two workers of one thread each over those of one process of one thread"
    shares = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    claims = [at_most(text, 0.6, median(shares))]
    write_measure(measure_path("workers"), claims, text=text_source(), seconds=seconds, rows=ROWS)


def _capture(place: Path, workers: int) -> None:
    (place / "output").mkdir(parents=True)
    store = open_store(str(place / "store"))
    section: dict[str, Any] = as_json(Distillation().cache)
    order = Order(
        title="cache teacher",
        stage=CACHE_TEACHER,
        section=section | {"temperature": 1.0, "task": "causal_lm", "device": "cpu"},
        unkeyed={"workers": workers},
        seed=0,
        inputs={"teacher": "a" * 64, "data": "b" * 64},
    )
    records: Any = {"teacher": SimpleNamespace(licence="none")}
    cache_teacher.work(
        Bench(
            order=order,
            inputs={"teacher": teacher_folder(), "data": place.parent / "data"},
            records=records,
            scratch=place,
            output=place / "output",
            checkpoints=store.checkpoints(order.key),
            progress=silent,
            store_url=store.url,
        )
    )
