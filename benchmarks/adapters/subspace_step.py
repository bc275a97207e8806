"""Seconds of the Hadamard transform, and of a training step in a subspace."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.adapters.places import measure_path
from benchmarks.adapters.work import random_rows
from benchmarks.claims import Claim, at_most, write_measure
from benchmarks.sst2 import BATCH, LENGTH, NAMES
from stillroom.builtin import import_builtin
from stillroom.fine_tuning import fine_tune
from stillroom.intrinsic_dimension.artifact import load_base
from stillroom.intrinsic_dimension.hadamard import transform
from stillroom.intrinsic_dimension.subspace import SubspaceModel, SubspaceOptions
from stillroom.training.options import TrainingOptions

THREADS = 2
FLOATS = 1 << 24
DIMENSION = 1000
ROUNDS = 5
STEPS = 3  # of which the first warms up


def measure() -> dict[str, float]:
    """Return medians of seconds: the transform, a step of each kind; and the two steps' ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        found = {"transform_seconds": _transform_seconds(), **_step_seconds()}
    finally:
        torch.set_num_threads(before)
    ratio = found["subspace_step_seconds"] / found["full_step_seconds"]
    return found | {"subspace_over_full": ratio}


def claims_of(found: dict[str, float]) -> list[Claim]:
    """Return what was promised of these figures."""
    return [
        at_most("seconds of the transform of 2^24 floats", 1.0, found["transform_seconds"]),
        at_most(
            "a subspace step over a full fine-tuning step, MiniLM, batch 32 x 64 tokens",
            2.0,
            found["subspace_over_full"],
        ),
    ]


def _transform_seconds() -> float:
    values = torch.randn(FLOATS, generator=torch.Generator().manual_seed(0))
    return median(_timed(values) for _ in range(2 * ROUNDS))


def _timed(values: torch.Tensor) -> float:
    began = time.perf_counter()
    transform(values)
    return time.perf_counter() - began


def _step_seconds() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        import_builtin("minilm", Path(temporary))
        full, base = (_classifier(Path(temporary)) for _ in range(2))
    subspace = SubspaceModel(base, SubspaceOptions(DIMENSION))
    seconds: dict[str, list[float]] = {"full": [], "subspace": []}
    for _ in range(ROUNDS):
        seconds["full"] += _steps(full)
        seconds["subspace"] += _steps(subspace)
    return {f"{kind}_step_seconds": median(values) for kind, values in seconds.items()}


def _classifier(folder: Path) -> Any:
    return load_base(folder, task="sequence_classification", label_names=NAMES)


def _steps(model: torch.nn.Module) -> list[float]:
    history = fine_tune(model, random_rows(LENGTH), TrainingOptions(steps=STEPS, batch_rows=BATCH))
    return [BATCH * LENGTH / speed for speed in history.tokens_per_second[1:]]


def measure_subspace_step() -> None:
    """Measure both, and keep the figures with their claims."""
    found = measure()
    facts = {"threads": THREADS, "dimension": DIMENSION, **found}
    write_measure(
        measure_path("subspace_step"), claims_of(found), text="random words", rows=[facts], **facts
    )
