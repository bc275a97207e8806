"""Run the benchmark, or one part of it: python -m benchmarks.distillation [PART].

Measurements that are done are not done again: delete their files below
.bench/distillation/measures, or name one, to repeat it. Exits 1 if a claim fails.
"""

import argparse
import sys
from collections.abc import Callable

from benchmarks.claims import print_claims
from benchmarks.distillation.caches import measure_caches
from benchmarks.distillation.depth import measure_depths
from benchmarks.distillation.mixture import measure_mixture
from benchmarks.distillation.peak import measure_peak
from benchmarks.distillation.places import measure_path
from benchmarks.distillation.results import gather
from benchmarks.distillation.sst2 import measure_few_labels, measure_sst2
from benchmarks.distillation.steps import measure_steps
from benchmarks.distillation.targets import measure_targets
from benchmarks.distillation.workers import measure_workers

MEASURES: dict[str, Callable[[], None]] = {
    "targets": measure_targets,
    "steps": measure_steps,
    "caches": measure_caches,
    "depths": measure_depths,
    "peak": measure_peak,
    "workers": measure_workers,
    "sst2": measure_sst2,
    "few_labels": measure_few_labels,
    "mixture": measure_mixture,
}


def main() -> int:
    """Return 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("report", *MEASURES), help="all by default")
    part = parser.parse_args().part
    for name, measure in MEASURES.items():
        if part == name or (part is None and not measure_path(name).exists()):
            print(f"measuring {name}", flush=True)
            measure()
    claims = gather(list(MEASURES))
    print_claims(claims)
    return int(not all(claim.holds for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
