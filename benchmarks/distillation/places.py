"""Where this benchmark leaves its files."""

from pathlib import Path

from benchmarks import places

HERE = Path(__file__).parent


def bench_folder() -> Path:
    """Return the folder of everything that is made and not committed."""
    return places.bench_folder("distillation")


def measure_path(name: str) -> Path:
    """Return the file of a measurement: a JSON object with `claims`, and whatever else."""
    return bench_folder() / "measures" / f"{name}.json"
