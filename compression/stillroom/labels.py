"""Which classes a model knows, if any, and whether they are those of the rows it is asked about."""

from pathlib import Path
from typing import Any

from stillroom.errors import MismatchError, SourceError
from stillroom.models import load_config, read_config

SHOWN = 5


def label_order(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's classes in the order of its outputs.

    Raises:
        SourceError: the folder holds no model that transformers knows.
    """
    return classes_of(load_config(folder))


def classes_of(config: Any) -> tuple[str, ...]:
    """Return the names of the classes that a model's config lists, in the order of its outputs."""
    names: dict[Any, Any] = config.id2label or {}
    return tuple(str(names[place]) for place in sorted(names, key=int))


def require_same_classes(
    known: tuple[str, ...], label_names: tuple[str, ...], whose: str, remedy: str
) -> None:
    """Refuse rows of other classes than a model's, or of the same in another order.

    A class without a name of its own (LABEL_0) may bear any; a number is the class of that place;
    capitals do not count.

    Raises:
        MismatchError: its sentence says `whose` model it is, and ends with the `remedy`.
    """
    fits = len(known) == len(label_names) and all(
        own.casefold() == name.casefold() or own == f"LABEL_{place}" or name == str(place)
        for place, (own, name) in enumerate(zip(known, label_names, strict=True))
    )
    if not fits:
        raise MismatchError(
            f"{whose}: expected rows of its {len(known)} classes in their order, {_listed(known)}; "
            f"{len(label_names)} came, {_listed(label_names)}; {remedy}"
        )


def require_label_head(folder: Path, whose: str, remedy: str) -> None:
    """Refuse a bare encoder, whose classes would be named by a head of random weights.

    Raises:
        SourceError: it is one; its sentence begins with `whose` it is, and ends with the `remedy`.
    """
    config = read_config(folder)
    if lacks_label_head(config):
        raise SourceError(
            f"{whose} holds a {config['architectures'][0]}, which has no head that names classes: "
            f"{remedy}"
        )


def lacks_label_head(config: dict[str, Any]) -> bool:
    """Return whether a config.json is of a model that would get a random head as a classifier."""
    name = (config.get("architectures") or [""])[0]
    own = "AutoModelForSequenceClassification" in config.get("auto_map", {})
    return bool(name) and not name.endswith("ForSequenceClassification") and not own


def require_trained_head(folder: Path) -> None:
    """Refuse a recipe's model that has no head for classes.

    Raises:
        SourceError: it is a bare encoder.
    """
    require_label_head(
        folder,
        str(folder),
        "a model saved as ForSequenceClassification expected; take one, or set teacher.fine_tune "
        "to train a head first",
    )


def require_known_labels(folder: Path, label_names: tuple[str, ...]) -> None:
    """Refuse a teacher whose outputs stand for other classes than `label_names`, in their order.

    Raises:
        SourceError: the model has no head that names classes.
        MismatchError: it has another number of classes, or classes of other names.
    """
    require_trained_head(folder)
    require_same_classes(
        label_order(folder),
        label_names,
        "the teacher",
        "name the text's classes as it does, or set teacher.fine_tune to train a new head",
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
