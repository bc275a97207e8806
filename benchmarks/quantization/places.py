"""Where the benchmark finds its data and leaves its files."""

import os
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def bench_folder() -> Path:
    """Return the folder of everything that is made and not committed."""
    return ROOT / ".bench" / "quantization"


def peer_folder(name: str) -> Path:
    """Return the folder of a peer's own environment."""
    return ROOT / ".bench" / "peers" / name


def data_folder() -> Path:
    """Return the folder with `wikitext2/` and `sst2/`; it may be absent."""
    return Path(os.environ.get("STILLROOM_BENCH_DATA", ROOT.parent / "shared" / "data"))
