"""Read a recipe from YAML, change single values, and say plainly what is wrong with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from stillroom.config.intrinsic_dimension import IntrinsicDimension
from stillroom.config.recipe import Recipe
from stillroom.config.section import Section
from stillroom.errors import RecipeError

S = TypeVar("S", bound=Section)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the YAML file `path`, with `changes` such as "quantization.bits=3".

    Raises:
        RecipeError: the file is missing or is no YAML, or a value is not one the recipe takes.
    """
    return _load(Recipe, path, changes)


def load_dimension_recipe(path: Path, changes: Sequence[str] = ()) -> IntrinsicDimension:
    """Return the search for an intrinsic dimension that the YAML file `path` describes, changed.

    Raises:
        RecipeError: the file is missing or is no YAML, or a value is not one the recipe takes.
    """
    return _load(IntrinsicDimension, path, changes)


def validate(values: dict[str, Any], where: str) -> Recipe:
    """Return the recipe that `values` describe; `where` names their origin in errors."""
    return _validate(Recipe, values, where)


def dump_recipe(recipe: Section) -> str:
    """Return the recipe as YAML, without what stands at its default."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _load(kind: type[S], path: Path, changes: Sequence[str]) -> S:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} is not there; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path}: expected keys and values, {type(values).__name__} came")
    for change in changes:
        _apply(values, change)
    return _validate(kind, values, str(path))


def _validate(kind: type[S], values: dict[str, Any], where: str) -> S:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: {_first_sentence(error)}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _apply(values: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {change}: expected key=value, such as quantization.bits=3")
    value = _parse(text, f"--set {change}")
    *parents, last = path.split(".")
    place: Any = values
    for key in parents:
        place = _step(place, key, change)
    if isinstance(place, list):
        _index(place, last, change)
        place[int(last)] = value
    else:
        place[last] = value


def _step(place: Any, key: str, change: str) -> Any:
    """Return what lies under `key`, made where it is absent."""
    if isinstance(place, list):
        return place[_index(place, key, change)]
    if place.get(key) is None:
        place[key] = {}
    if not isinstance(place[key], dict | list):
        raise RecipeError(f"--set {change}: {key} is a single value and has nothing below it")
    return place[key]


def _index(place: list[Any], key: str, change: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise RecipeError(f"--set {change}: expected 0 to {len(place) - 1}, {key} came")
    return int(key)


def _first_sentence(error: ValidationError) -> str:
    """Return every complaint as `field: what is wrong`, in one line."""
    complaints = []
    for item in error.errors():
        place = _place(item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; `python -m flows schema` lists the known ones"
        elif item["type"] != "missing" and not item["msg"].startswith("Value error"):
            message = f"{message}, {item['input']!r} came"
        complaints.append(f"{place}: {message}" if place else message)
    return "; ".join(complaints)


def _place(location: tuple[int | str, ...]) -> str:
    """Return where a complaint is, as the recipe has it: adapters.0.rank."""
    # pydantic names the chosen member of a union as if it were a level of its own.
    unions = {i + 2 for i, part in enumerate(location) if part == "adapters"}
    return ".".join(str(part) for i, part in enumerate(location) if i not in unions)
