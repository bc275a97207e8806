"""A benchmark of several measurements: run those that are missing, and gather what was found."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.claims import Claim, print_claims

Measures = Mapping[str, Callable[[], None]]


def run_parts(
    description: str | None,
    measures: Measures,
    path_of: Callable[[str], Path],
    gather: Callable[[list[str]], list[Claim]],
) -> int:
    """Measure what the command line names, by default what is missing; return 1 if a claim fails.

    `path_of` is where each measurement keeps what it found, `gather` writes the results.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", nargs="?", choices=("report", *measures), help="all by default")
    part = parser.parse_args().part
    for name, measure in measures.items():
        if part == name or (part is None and not path_of(name).exists()):
            print(f"measuring {name}", flush=True)
            measure()
    claims = gather(list(measures))
    print_claims(claims)
    return int(not all(claim.holds for claim in claims))
