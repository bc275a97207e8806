"""Which learning rate serves each method best: python -m benchmarks.adapters.rates [NAME].

Each is tried as the benchmark trains, with two seeds, and measured on phrases of sentences that
neither the training nor the test phrases are parts of. `methods.py` holds what was found: the best
of the mean, or where two are as good the lower, which spreads less from seed to seed. A GPU, where
there is one, is shared by as many trials as there are threads.
"""

import random
import sys
from dataclasses import replace
from functools import cache

import torch

from benchmarks.adapters.methods import METHODS, Method
from benchmarks.adapters.work import (
    PRECISION,
    TEST_EXAMPLES,
    TRAIN_EXAMPLES,
    base_folder,
    fresh,
    training,
)
from benchmarks.phrases import split_by_sentence
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import as_rows, correct, split
from stillroom.adapters.training import train_adapter
from stillroom.data.examples import Examples

RATES = (1e-4, 2e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1)
MEASURED = 8_000


def main() -> None:
    """Print the accuracy at each method's rate and at those next to it."""
    base_folder("fp32")
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    cells = [
        (method, rate, seed)
        for method in METHODS
        if wanted in method.name
        for rate in RATES
        if 1 / 3.5 < rate / method.learning_rate < 3.5
        for seed in SEEDS
    ]
    side_by_side(_try, cells, PRECISION)


def _try(method: Method, rate: float, seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapted = fresh(method, "fp32", seed, device)
    learned, measured = _rows()
    train_adapter(adapted, "a", learned, training(replace(method, learning_rate=rate), seed))
    right = correct(adapted, measured)
    share = 100 * sum(right) / len(right)
    print(f"{method.name}: {rate:g} gives {share:.2f} %, seed {seed}", flush=True)


@cache
def _rows() -> tuple[Examples, Examples]:
    phrases = [(each.text, each.label) for each in split(TEST_EXAMPLES)[0]]
    learned, measured = split_by_sentence(phrases, random.Random(5), MEASURED)
    chosen = random.Random(1).sample(learned, TRAIN_EXAMPLES)
    return as_rows(chosen, base_folder("fp32")), as_rows(measured, base_folder("fp32"))


if __name__ == "__main__":
    main()
