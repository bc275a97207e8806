"""Train an adapter on its frozen base."""

from collections.abc import Sequence
from typing import Any

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import method_of
from stillroom.checkpoint import Checkpoints
from stillroom.contents import Task
from stillroom.data.examples import Examples
from stillroom.errors import MismatchError
from stillroom.fine_tuning import fine_tune
from stillroom.progress import Progress, silent
from stillroom.training.history import TrainingHistory
from stillroom.training.options import TrainingOptions

SHOWN = 5  # classes that a message names


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
    if examples.label_names:
        _require_classes_of(model.base, examples.label_names, name)
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


def _require_classes_of(base: Any, label_names: tuple[str, ...], adapter: str) -> None:
    """Refuse classes that would be served by the names of others: an adapter has none of its own.

    A class of the base without a name (LABEL_0) may bear any; a number is the class of that place.
    """
    known = [str(name) for _, name in sorted(base.config.id2label.items())]
    fits = len(known) == len(label_names) and all(
        own in (name, f"LABEL_{place}") or name == str(place)
        for place, (own, name) in enumerate(zip(known, label_names, strict=True))
    )
    if not fits:
        raise MismatchError(
            f"adapter {adapter}: expected rows of the base's {len(known)} classes in their order, "
            f"{_listed(known)}; {len(label_names)} came, {_listed(label_names)}; name the text's "
            "classes as the base does, or tune a base on them first"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def task_of(examples: Examples) -> Task:
    """Return what a model learns from these rows."""
    if examples.label_names:
        return "sequence_classification"
    return "masked_lm" if examples.masked else "causal_lm"
