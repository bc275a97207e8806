"""Where this benchmark leaves its files."""

from pathlib import Path

from benchmarks import places

HERE = Path(__file__).parent


def bench_folder() -> Path:
    """Return the folder of everything that is made and not committed."""
    return places.bench_folder("adapters")


def measure_path(name: str) -> Path:
    """Return the file of a measurement: a JSON object with `claims`, and whatever else."""
    return bench_folder() / "measures" / f"{name}.json"


def cell_path(name: str) -> Path:
    """Return the file of one training's result, which is not done again while it is there."""
    return bench_folder() / "cells" / f"{name}.json"
