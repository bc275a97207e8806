"""One trial of a search: train a base in a subspace, or all of it, and measure it."""

import math
from dataclasses import dataclass, replace

from torch import nn

from stillroom.checkpoint import Checkpoints
from stillroom.contents import Task
from stillroom.data.examples import Examples
from stillroom.errors import DataError, NotFiniteError
from stillroom.fine_tuning import fine_tune, measure
from stillroom.intrinsic_dimension.projection import Kind
from stillroom.intrinsic_dimension.search import ModelSize, Trial
from stillroom.intrinsic_dimension.subspace import (
    SubspaceModel,
    SubspaceOptions,
    lora_parameters_a_rank,
)
from stillroom.progress import Progress, silent
from stillroom.training.history import HELD_OUT_LOSS, TrainingHistory
from stillroom.training.options import TrainingOptions

ACCURACY = "held_out_accuracy"


@dataclass(frozen=True)
class TrialOptions:
    """What all trials of a search share; a trial's seed takes the place of those in the options.

    `full` trains all parameters, `subspace` the d numbers. The latter's learning rate is that of
    the step in θ (D,): the d numbers get √(D / d) times as much, so that at one rate AdamW's first
    steps are as long in θ whatever d is, and as long as those of all parameters.
    """

    full: TrainingOptions
    subspace: TrainingOptions
    projection: Kind = "fastfood"
    structure_aware: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its score, what was measured on held-out rows, and what was trained.

    `model` is the base itself but for a trial in a subspace; `size` is the base's.
    """

    score: float
    figures: dict[str, float]
    history: TrainingHistory
    model: nn.Module
    size: ModelSize


def run_trial(
    trial: Trial,
    base: nn.Module,
    rows: tuple[Examples, Examples],
    options: TrialOptions,
    *,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> Outcome:
    """Train `base`, in place, as `trial` says on the first of `rows`; measure it on the second.

    The score is the accuracy of a classifier, and of a language model minus its nats a prediction.

    Raises:
        DataError: no rows are held out.
        NotFiniteError: what was measured is NaN or infinite.
        what `SubspaceModel` and `stillroom.training.loop.train` raise.
    """
    train_rows, held_out = rows
    if len(held_out) == 0:
        raise DataError("trials are compared on held-out rows: expected some, got none; add text")
    parameters = sum(value.numel() for value in base.parameters() if value.requires_grad)
    size = ModelSize(parameters, lora_parameters_a_rank(base))
    model, training = base, replace(options.full, seed=trial.seed)
    if trial.dimension:
        training = _as_long_in_all(options.subspace, trial, parameters)
        model = SubspaceModel(base, _subspace(trial, options))
    history = TrainingHistory()
    if trial.dimension == 0:
        figures = measure(base.eval(), held_out, training.batch_rows)
    else:
        history = fine_tune(
            model,
            train_rows,
            training,
            evaluation=held_out,
            checkpoints=checkpoints,
            fingerprint=fingerprint,
            progress=progress,
        )
        figures = history.kept()
    _require_finite(trial, figures)
    return Outcome(score_of(figures, _task(train_rows)), figures, history, model.eval(), size)


def _as_long_in_all(training: TrainingOptions, trial: Trial, parameters: int) -> TrainingOptions:
    assert trial.dimension
    # AdamW moves each number by about the rate, and P keeps lengths: √d of it in θ, not √D.
    rate = training.learning_rate * math.sqrt(parameters / trial.dimension)
    return replace(training, seed=trial.seed, learning_rate=rate)


def score_of(figures: dict[str, float], task: Task) -> float:
    """Return the figure that trials are compared by; higher is better."""
    if task == "sequence_classification":
        return figures[ACCURACY]
    return -figures[HELD_OUT_LOSS]


def _require_finite(trial: Trial, figures: dict[str, float]) -> None:
    # The last step may be the first that is too long: no loss of training tells of it.
    for name, figure in figures.items():
        if not math.isfinite(figure):
            advice = (
                "lower learning_rate" if trial.dimension != 0 else "look at the model's weights"
            )
            raise NotFiniteError(
                f"trial {trial.name}: {name} is {figure}; expected a finite number: {advice}"
            )


def _subspace(trial: Trial, options: TrialOptions) -> SubspaceOptions:
    assert trial.dimension
    return SubspaceOptions(
        dimension=trial.dimension,
        projection=options.projection,
        structure_aware=options.structure_aware,
        seed=trial.seed,
    )


def _task(rows: Examples) -> Task:
    if rows.label_names:
        return "sequence_classification"
    return "masked_lm" if rows.masked else "causal_lm"
