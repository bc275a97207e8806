"""Where this benchmark leaves its files."""

from pathlib import Path

from benchmarks import places
from benchmarks.places import ROOT

HERE = Path(__file__).parent


def bench_folder() -> Path:
    """Return the folder of everything that is made and not committed."""
    return places.bench_folder("quantization")


def peer_folder(name: str) -> Path:
    """Return the folder of a peer's own environment."""
    return ROOT / ".bench" / "peers" / name
