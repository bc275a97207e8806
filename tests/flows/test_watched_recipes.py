"""Which recipes the sensor refuses to watch."""

import pytest

from flows.watch_sources import require_an_end
from stillroom.config import Recipe, validate
from stillroom.errors import RecipeError

RECIPE = {
    "name": "tiny",
    "data": {"train": {"source": "builtin:python-docs"}},
    "quantization": {},
    "publish": {"name": "tiny"},
    "adapters": [
        {"name": "law", "data": {"train": {"source": "builtin:python-source"}}, "merge": {}},
        {"name": "art", "data": {"train": {"source": "builtin:python-source"}}},
    ],
}


def recipe_of(teacher: str) -> Recipe:
    return validate(RECIPE | {"teacher": {"source": f"models:/{teacher}"}}, "recipe.yaml")


@pytest.mark.parametrize("teacher", ["tiny@champion", "tiny@latest", "tiny-law-merged@champion"])
def test_what_a_recipe_publishes_cannot_order_its_next_run(teacher: str) -> None:
    with pytest.raises(RecipeError, match="is what it publishes"):
        require_an_end(recipe_of(teacher))


@pytest.mark.parametrize("teacher", ["tiny/1", "tiny@best", "tiny-art-merged@champion"])
def test_what_a_recipe_does_not_move_may_be_its_teacher(teacher: str) -> None:
    require_an_end(recipe_of(teacher))
