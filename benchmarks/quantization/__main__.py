"""Run the benchmark, or one part of it: python -m benchmarks.quantization [PART].

Rows and measurements that are done are not done again: delete their files below
.bench/quantization/ to repeat them. Exits 1 if a claim fails.
"""

import argparse
import sys
from collections.abc import Callable

from benchmarks.claims import print_claims
from benchmarks.quantization.cells import Cell, table_cells, timing_cells
from benchmarks.quantization.decode import measure_decode
from benchmarks.quantization.gpu import has_gpu, measure_gpu
from benchmarks.quantization.measures import (
    measure_growth,
    measure_kills,
    measure_memory,
    measure_path,
)
from benchmarks.quantization.results import gather, measure_floor, print_table
from benchmarks.quantization.rows import make_row, row_path
from benchmarks.quantization.sst2 import measure_sst2

MEASURES: dict[str, Callable[[], None]] = {
    "floor": measure_floor,
    "growth": measure_growth,
    "memory": measure_memory,
    "kills": measure_kills,
    "sst2": measure_sst2,
    "decode": measure_decode,
    **({"gpu": measure_gpu} if has_gpu() else {}),
}
PARTS = ("peers", "rows", "timing", "measures", "report", *MEASURES)


def main() -> int:
    """Return 1 if a claim fails or a row could not be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them by default")
    part = parser.parse_args().part
    cells = table_cells()
    failures = 0
    if part == "peers":
        failures += _make([cell for cell in cells if cell.method != "stillroom"])
    if part in (None, "rows"):
        failures += _make(cells)
    if part == "timing":
        for cell in timing_cells():
            row_path(cell).unlink(missing_ok=True)
    if part in (None, "timing"):
        failures += _make(timing_cells())
    for name, measure in MEASURES.items():
        if part == name or (part in (None, "measures") and not measure_path(name).exists()):
            print(f"measuring {name}", flush=True)
            measure()
    claims = gather()
    print_table()
    print_claims(claims)
    return int(bool(failures) or not all(claim.holds for claim in claims))


def _make(cells: list[Cell]) -> int:
    """Make the rows that are not there, and return how many failed."""
    failures = 0
    for cell in cells:
        if row_path(cell).exists():
            continue
        print(f"running {cell.name}", flush=True)
        try:
            make_row(cell)
        except RuntimeError as error:
            failures += 1
            print(error, file=sys.stderr)
    return failures


if __name__ == "__main__":
    sys.exit(main())
