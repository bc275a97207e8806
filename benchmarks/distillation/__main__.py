"""Run the benchmark, or one part of it: python -m benchmarks.distillation [PART].

Measurements that are done are not done again: delete their files below
.bench/distillation/measures, or name one, to repeat it. Exits 1 if a claim fails.
"""

import sys
from collections.abc import Callable

from benchmarks.distillation.bias import measure_bias
from benchmarks.distillation.caches import measure_caches
from benchmarks.distillation.depth import measure_depths
from benchmarks.distillation.mixture import measure_mixture
from benchmarks.distillation.peak import measure_peak
from benchmarks.distillation.places import measure_path
from benchmarks.distillation.results import gather
from benchmarks.distillation.sst2 import measure_sst2
from benchmarks.distillation.steps import measure_steps
from benchmarks.distillation.targets import measure_targets
from benchmarks.distillation.workers import measure_workers
from benchmarks.parts import run_parts

MEASURES: dict[str, Callable[[], None]] = {
    "targets": measure_targets,
    "steps": measure_steps,
    "caches": measure_caches,
    "bias": measure_bias,
    "depths": measure_depths,
    "peak": measure_peak,
    "workers": measure_workers,
    "sst2": measure_sst2,
    "mixture": measure_mixture,
}


if __name__ == "__main__":
    sys.exit(run_parts(__doc__, MEASURES, measure_path, gather))
