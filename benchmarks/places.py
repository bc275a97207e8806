"""Where the benchmarks find their data and leave their files."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bench_folder(benchmark: str) -> Path:
    """Return the folder of everything that a benchmark makes and that is not committed."""
    return ROOT / ".bench" / benchmark


def data_folder() -> Path:
    """Return the folder with `wikitext2/` and `sst2/`; it may be absent."""
    return Path(os.environ.get("STILLROOM_BENCH_DATA", ROOT.parent / "shared" / "data"))
