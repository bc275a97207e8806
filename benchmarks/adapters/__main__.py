"""Run the benchmark, or one part of it: python -m benchmarks.adapters [PART].

Measurements that are done are not done again: delete their files below .bench/adapters, or name
one, to repeat it. Exits 1 if a claim fails.
"""

import sys
from collections.abc import Callable

from benchmarks.adapters.by_peft import measure_by_peft
from benchmarks.adapters.costs import measure_costs
from benchmarks.adapters.dimension import measure_dimension
from benchmarks.adapters.few_examples import measure_few_examples
from benchmarks.adapters.places import measure_path
from benchmarks.adapters.results import gather
from benchmarks.adapters.sst2 import measure_sst2
from benchmarks.adapters.subspace_step import measure_subspace_step
from benchmarks.adapters.text import measure_text
from benchmarks.parts import run_parts

MEASURES: dict[str, Callable[[], None]] = {
    "costs": measure_costs,
    "sst2": measure_sst2,
    "by_peft": measure_by_peft,
    "few_examples": measure_few_examples,
    "text": measure_text,
    "dimension": measure_dimension,
    "subspace_step": measure_subspace_step,
}


if __name__ == "__main__":
    sys.exit(run_parts(__doc__, MEASURES, measure_path, gather))
