"""Which learning rate serves each method best: python -m benchmarks.adapters.rates [NAME].

Each is tried on as many training phrases as the benchmark learns from and measured on others of
them; no test phrase is seen. `methods.py` holds what was found.
"""

import sys
from dataclasses import replace

from benchmarks.adapters.methods import METHODS, Method
from benchmarks.adapters.work import (
    CALIBRATION_EXAMPLES,
    TRAIN_EXAMPLES,
    base_folder,
    fresh,
    train_rows,
    training,
)
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import correct
from stillroom.adapters.training import train_adapter

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MEASURED = 4_000
BEFORE = TRAIN_EXAMPLES + CALIBRATION_EXAMPLES  # what the benchmark learns from and calibrates on


def main() -> None:
    """Print the accuracy at each method's rate and at those next to it."""
    base_folder("fp32")
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    cells = [
        (method, rate)
        for method in METHODS
        if wanted in method.name
        for rate in RATES
        if 1 / 3.5 < rate / method.learning_rate < 3.5
    ]
    side_by_side(_try, cells)


def _try(method: Method, rate: float) -> None:
    adapted = fresh(method, "fp32", 0)
    tried = replace(method, learning_rate=rate)
    train_adapter(adapted, "a", train_rows(TRAIN_EXAMPLES, BEFORE), training(tried, 0))
    right = correct(adapted, train_rows(MEASURED, BEFORE + TRAIN_EXAMPLES))
    print(f"{method.name}: {rate:g} gives {100 * sum(right) / MEASURED:.2f} %", flush=True)


if __name__ == "__main__":
    main()
