"""Train an adapter on its frozen base."""

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import method_of
from stillroom.checkpoint import Checkpoints
from stillroom.contents import Task
from stillroom.data.examples import Examples
from stillroom.fine_tuning import fine_tune
from stillroom.labels import classes_of, require_same_classes
from stillroom.progress import Progress, silent
from stillroom.training.history import TrainingHistory
from stillroom.training.options import TrainingOptions


def train_adapter(
    model: AdaptedModel,
    name: str,
    examples: Examples,
    training: TrainingOptions,
    *,
    evaluation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Train the adapter `name` by cross-entropy, in place; nothing else of the model changes.

    Raises:
        MismatchError: the rows are of other classes than the base's, or of these in another order.
        what `stillroom.training.loop.train` raises.
    """
    if examples.label_names:  # an adapter has no names of its own
        require_same_classes(
            classes_of(model.base.config),
            examples.label_names,
            f"the base of adapter {name}",
            "name the text's classes as the base does, or tune a base on them first",
        )
    model.select(name)
    model.trainable(name)
    options = model.worn(name).options
    return fine_tune(
        model,
        examples,
        training,
        evaluation=evaluation,
        checkpoints=checkpoints,
        fingerprint=f"{fingerprint} {method_of(options)} {options}",
        progress=progress,
    )


def task_of(examples: Examples) -> Task:
    """Return what a model learns from these rows."""
    if examples.label_names:
        return "sequence_classification"
    return "masked_lm" if examples.masked else "causal_lm"
