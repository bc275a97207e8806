"""Which classes a model knows, and whether they are those of the rows that it is asked about."""

from pathlib import Path
from typing import Any

from stillroom.errors import MismatchError, SourceError
from stillroom.models import lacks_label_head, load_config, read_config

SHOWN = 5


def label_order(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's classes in the order of its outputs.

    Raises:
        SourceError: the folder holds no model that transformers knows.
    """
    names: dict[Any, Any] = load_config(folder).id2label or {}
    return tuple(str(names[place]) for place in sorted(names, key=int))


def require_known_labels(folder: Path, label_names: tuple[str, ...]) -> None:
    """Refuse a classifier whose outputs stand for other classes than `label_names`, in their order.

    A class without a name of its own (LABEL_0) may bear any; a number is the class of that place.

    Raises:
        SourceError: the model has no head that names classes.
        MismatchError: it has another number of classes, or classes of other names.
    """
    config = read_config(folder)
    if lacks_label_head(config):
        raise SourceError(
            f"{folder} holds a {config['architectures'][0]}, which has no head that names classes: "
            "a model saved as ForSequenceClassification expected; take one, or set "
            "teacher.fine_tune to train a head first"
        )
    known = label_order(folder)
    fits = len(known) == len(label_names) and all(
        own in (name, f"LABEL_{i}") or name == str(i)
        for i, (own, name) in enumerate(zip(known, label_names, strict=True))
    )
    if not fits:
        raise MismatchError(
            f"labels that the teacher knows expected: its {len(known)} classes are "
            f"{_listed(known)}, the {len(label_names)} of the text {_listed(label_names)}; name "
            "the text's classes as the teacher does, or set teacher.fine_tune to train a new head"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
