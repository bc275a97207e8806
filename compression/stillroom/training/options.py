"""How the training loop runs: its options and its schedule."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from stillroom.errors import RecipeError
from stillroom.training.team import Parallel


@dataclass(frozen=True)
class TrainingOptions:
    """How the training loop runs; a step is one update by the optimizer.

    `evaluate_every_steps` of 0 evaluates once, after the last step. With
    `early_stopping_patience` above 0 the run ends after so many evaluations in a row that did not
    lower the watched figure, and the parameters of the lowest stay. The autocast `dtype` leaves
    the parameters and the optimizer in the model's own format.
    """

    steps: int | None = None
    epochs: float = 1.0  # passes over the rows; ignored where steps is given
    batch_rows: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 5e-4
    warmup_fraction: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    seed: int = 0
    checkpoint_every_steps: int = 100
    evaluate_every_steps: int = 0
    early_stopping_patience: int = 0
    bucket_by_length: bool = False  # rows of about one length share a batch: less padding
    gradient_checkpointing: bool = False  # activations are made again, not kept: memory for time
    parallel: Parallel = "ddp"  # how processes share the model, where several train it
    dtype: Literal["float32", "bfloat16"] = "float32"


def total_steps(options: TrainingOptions, rows: int) -> int:
    """Return the number of optimizer steps over `rows` rows.

    Raises:
        RecipeError: there would be none.
    """
    steps = options.steps
    if steps is None:
        rows_a_step = options.batch_rows * options.gradient_accumulation
        steps = math.ceil(rows * options.epochs / rows_a_step)
    if steps < 1:
        raise RecipeError(
            f"training: expected at least one step, got {steps} "
            f"({rows} rows, epochs {options.epochs}); give steps, more epochs or more text"
        )
    return steps


def learning_rate_at(step: int, steps: int, options: TrainingOptions) -> float:
    """Return the learning rate of `step`, counted from 1 to `steps`.

    It rises linearly over the warm-up, whose last step has the full rate, then falls towards
    zero along half a cosine or a line, or stays.
    """
    warmup = math.ceil(options.warmup_fraction * steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    # Counted so that the last step still moves: zero would be reached one step after it.
    rest = (step - warmup) / (steps - warmup + 1)
    match options.schedule:
        case "cosine":
            return options.learning_rate * (1 + math.cos(math.pi * rest)) / 2
        case "linear":
            return options.learning_rate * (1 - rest)
        case "constant":
            return options.learning_rate


def derived_seed(*parts: object) -> int:
    """Return a seed in [0, 2^63) that depends on every part, and on nothing else."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
