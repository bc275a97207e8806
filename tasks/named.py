"""Recipes by name: files of the operator's own, in one folder of the worker's machine."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillroom.config import Recipe, load_recipe
from stillroom.errors import RecipeError

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
RecipeName = Annotated[str, Field(pattern=f"^{NAME}$")]


def recipe_names(folder: Path) -> list[str]:
    """Return the names of the recipes in `folder`, sorted.

    Raises:
        RecipeError: there is no such folder.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{folder} is no folder: set STILLROOM_RECIPES where the worker is started to the one "
            "that holds the recipes"
        )
    return sorted(file.stem for file in folder.glob("*.yaml") if re.fullmatch(NAME, file.stem))


def load_named(name: str, folder: Path, changes: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that name in `folder`, with `changes` such as "quantization.bits=3".

    Raises:
        RecipeError: there is none of that name, or it is not one that can be made.
    """
    names = recipe_names(folder)
    # A name is looked up, never made a path of: it leads to no other folder.
    if name not in names:
        raise RecipeError(
            f"no recipe is named {name!r}; expected one of {', '.join(names) or 'none'}, which are "
            f"the files of {folder} without their .yaml"
        )
    return load_recipe(folder / f"{name}.yaml", changes)
