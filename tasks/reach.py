"""What a recipe that came through the server may read: whoever can order a run is no user here."""

import os
from itertools import chain
from pathlib import Path

from stillroom.config import Model, Recipe, Text
from stillroom.errors import SourceError
from tasks.settings import Settings
from tasks.sources import place_of


def places_of(recipe: Recipe) -> frozenset[Model | Text]:
    """Return the models and texts that a recipe names, each as it is read."""
    data = [recipe.data, *(each.data for each in recipe.adapters)]
    texts = [text for each in data for text in (each.train, each.evaluation) if text is not None]
    return frozenset([as_read(recipe.teacher), *texts])


def as_read(place: Model | Text) -> Model | Text:
    """Return a place with what decides what is read there, and nothing else.

    Of a text that is everything: another column of the same file is another text.
    """
    if isinstance(place, Text):
        return place
    usual = Model(source=place.source)
    later = ("dtype", "config", "fine_tune", "vocabulary")
    return place.model_copy(update={name: getattr(usual, name) for name in later})


def require_within_reach(place: Model | Text, settings: Settings) -> None:
    """Refuse a local path outside STILLROOM_DATA_ROOTS and an object outside STILLROOM_S3_SOURCES.

    A path counts by where it leads: it and everything below it, links followed. Builtins, hub ids
    and registered models are within reach; the code of a model only with
    STILLROOM_ALLOW_REMOTE_CODE.

    Raises:
        SourceError: it is not within reach; the message says who can change that.
    """
    if isinstance(place, Model) and place.trust_remote_code:
        require_code_allowed(place.source, settings)
    where = place_of(place.source)
    if where == "local":
        _require_below_a_root(place.source, settings)
    elif where == "s3":
        _require_listed(place.source, settings)


def require_code_allowed(what: str, settings: Settings) -> None:
    """Refuse what comes through the server and would run a model's own code.

    Raises:
        SourceError: this machine's settings do not allow it.
    """
    if not settings.allow_remote_code:
        raise SourceError(
            f"{what}: trust_remote_code runs the model's own code, which a recipe or a stage that "
            "comes through the server may not; take a model that needs none, or set "
            "STILLROOM_ALLOW_REMOTE_CODE=true where the worker is started"
        )


def _require_below_a_root(reference: str, settings: Settings) -> None:
    listed = [Path(each).expanduser() for each in settings.data_roots.split(os.pathsep) if each]
    roots = [root.resolve() for root in listed]
    path = Path(reference).expanduser()
    # The path first: nothing else is looked at where it is out of reach.
    if all(_is_below(each, roots) for each in chain([path], path.rglob("*"))):
        return
    raise SourceError(
        f"{reference}: a recipe that comes through the server may read local files below "
        f"{_list(listed)} alone, links followed; put them there, or set STILLROOM_DATA_ROOTS where "
        "the worker is started"
    )


def _is_below(path: Path, roots: list[Path]) -> bool:
    try:
        led = path.resolve()
    except (OSError, RuntimeError):  # links that nobody may follow, or that lead in a circle
        return False
    return any(led.is_relative_to(root) for root in roots)


def _require_listed(reference: str, settings: Settings) -> None:
    listed = settings.s3_sources.split()
    if any(f"{reference}/".startswith(f"{each.rstrip('/')}/") for each in listed):
        return
    raise SourceError(
        f"{reference}: a recipe that comes through the server may read S3 below "
        f"{_list(listed)} alone; put it there, or set STILLROOM_S3_SOURCES where the worker is "
        "started"
    )


def _list(places: list[str] | list[Path]) -> str:
    return ", ".join(map(str, places)) or "no place"
