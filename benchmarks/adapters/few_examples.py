"""The low-data setting: 200 phrases, where prefix tuning is said to win (2101.00190, 6.3)."""

from statistics import fmean
from typing import Any

from benchmarks.adapters.methods import (
    DEEP_PROMPT,
    FULL,
    HOULSBY,
    LORA,
    PREFIX,
    PROMPT,
    Method,
)
from benchmarks.adapters.places import measure_path
from benchmarks.adapters.work import (
    PRECISION,
    SEEDS,
    base_folder,
    fresh,
    test_examples,
    test_rows,
    train_rows,
    training,
)
from benchmarks.claims import write_measure
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import Right, correct, has_sst2, points_lost
from stillroom.adapters.training import train_adapter

EXAMPLES = 200
EPOCHS = 10.0
COMPARED = (FULL, HOULSBY, LORA, PREFIX, DEEP_PROMPT, PROMPT)


def measure_few_examples() -> None:
    """Train some methods on few phrases, other ones for each seed, and compare."""
    if not has_sst2():
        return
    base_folder("fp32")
    cells = [(method, seed) for method in COMPARED for seed in SEEDS]
    found = side_by_side(_right, cells, PRECISION)
    right: dict[str, Right] = {}
    for (method, _), one in zip(cells, found, strict=True):
        right.setdefault(method.name, []).append(one)
    rows: list[dict[str, Any]] = []
    for name, of in right.items():
        lost = points_lost(right[FULL.name], of, test_examples())
        rows.append(
            {
                "method": name,
                "accuracy": 100 * fmean(fmean(each) for each in of),
                "lost": lost.value,
                "standard_error": lost.standard_error,
            }
        )
    write_measure(
        measure_path("few_examples"),
        [],
        text="SST-2",
        rows=rows,
        seeds=len(SEEDS),
        train_examples=EXAMPLES,
        examples=len(test_examples()),
    )


def _right(method: Method, seed: int) -> list[bool]:
    adapted = fresh(method, "fp32", seed)
    rows = train_rows(EXAMPLES, seed * EXAMPLES)
    train_adapter(adapted, "a", rows, training(method, seed, epochs=EPOCHS))
    return correct(adapted, test_rows())
