"""Which learning rate serves each method best: python -m benchmarks.adapters.rates [NAME].

Each is tried on some of the training phrases and measured on others of them; no test phrase is
seen. `methods.py` holds what was found.
"""

import sys
from dataclasses import replace

from benchmarks.adapters.methods import METHODS
from benchmarks.adapters.work import TRAIN_EXAMPLES, fresh, train_rows, training
from benchmarks.sst2 import correct
from stillroom.adapters.training import train_adapter

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TRIED = 1_000
MEASURED = 2_000
BEFORE = TRAIN_EXAMPLES + 512  # what the benchmark learns from and calibrates on


def main() -> None:
    """Print the accuracy at each rate."""
    learned, measured = train_rows(TRIED, BEFORE), train_rows(MEASURED, BEFORE + TRIED)
    for method in METHODS:
        if len(sys.argv) > 1 and sys.argv[1] not in method.name:
            continue
        near = [rate for rate in RATES if 1 / 3.5 < rate / method.learning_rate < 3.5]
        for rate in near:
            adapted = fresh(method, "fp32", 0)
            tried = replace(method, learning_rate=rate)
            train_adapter(adapted, "a", learned, training(tried, 0))
            right = correct(adapted, measured)
            print(f"{method.name}: {rate:g} gives {100 * sum(right) / MEASURED:.2f} %", flush=True)


if __name__ == "__main__":
    main()
