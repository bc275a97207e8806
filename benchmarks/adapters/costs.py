"""Seconds of a training step, and the memory it takes, of each method on each base.

Each is measured in a process of its own: python -m benchmarks.adapters.costs BASE NUMBER prints it.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.adapters.methods import FULL, METHODS
from benchmarks.adapters.places import measure_path
from benchmarks.adapters.work import BASES, base_folder, fresh, random_rows, training
from benchmarks.claims import write_measure
from benchmarks.places import ROOT
from benchmarks.sst2 import BATCH, LENGTH
from stillroom.adapters.training import train_adapter
from stillroom.hardware import threads_here

STEPS = 6  # of which the first warms up
ROUNDS = 3


def measure_costs() -> None:
    """Time each method on each base, interleaved, and keep the medians."""
    for base in BASES:
        base_folder(base)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for base in BASES:
            for number, method in enumerate(METHODS):
                found.setdefault((base, method.name), []).append(_in_process(base, number))
    whole = found[BASES[0], FULL.name]
    table = [
        {
            "base": base,
            "method": method,
            "seconds": median(each["seconds"] for each in every),
            "over_full": median(
                ours["seconds"] / theirs["seconds"]
                for ours, theirs in zip(every, whole, strict=True)
            ),
            "memory_mb": median(each["memory_bytes"] for each in every) / 1e6,
        }
        for (base, method), every in found.items()
    ]
    write_measure(
        measure_path("costs"),
        [],
        text="random words",
        rows=table,
        threads=threads_here(),
        rounds=ROUNDS,
    )


def _in_process(base: str, number: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.adapters.costs", base, str(number)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(base: str, number: int) -> dict[str, Any]:
    torch.set_num_threads(threads_here())
    method = METHODS[number]
    adapted = fresh(method, base, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading took more
    before = _status_bytes("VmRSS")
    history = train_adapter(adapted, "a", random_rows(LENGTH), training(method, 0, steps=STEPS))
    return {
        "seconds": median(BATCH * LENGTH / speed for speed in history.tokens_per_second[1:]),
        "memory_bytes": float(_status_bytes("VmHWM") - before),
    }


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
