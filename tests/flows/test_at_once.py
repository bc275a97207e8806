"""Runs at the same time on one server: of one recipe, and of many."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import House, small_recipe

MANY = 20
FRESH = 4
"""So many of them make something, the others find it Cached."""

pytestmark = [pytest.mark.integration, pytest.mark.service]


def measured_only(recipe: dict[str, Any], parts: Path, seed: int) -> dict[str, Any]:
    """Return a recipe that measures the teacher, and does no more."""
    small = small_recipe(recipe, parts) | {"seed": seed, "adapters": []}
    for section in ("distillation", "quantization", "publish"):
        del small[section]
    return small


def test_two_runs_of_one_recipe_end_with_one_artifact(
    house: House, recipe: dict[str, Any], parts: Path
) -> None:
    same = small_recipe(recipe, parts) | {"seed": 81, "name": "twins", "publish": {"name": "twins"}}
    same["adapters"] = []
    before = {record.key for record in house.terminal.store.records()}
    runs = [house.ordered(same) for _ in range(2)]
    for run in runs:
        house.done(run)
    made = [record for record in house.terminal.store.records() if record.key not in before]
    assert Counter(record.kind for record in made)["model"] == 3  # teacher, student, quantized
    assert list(house.terminal.store.verify()) == []
    found = house.ask_mlflow("GET", "/registered-models/alias", name="twins", alias="champion")
    assert found["model_version"]["version"] == "1"
    states = [house.states(run) for run in runs]
    assert states[0].keys() == states[1].keys()


@pytest.mark.timeout(600)
def test_many_runs_at_once_all_end_well(house: House, recipe: dict[str, Any], parts: Path) -> None:
    first = measured_only(recipe, parts, seed=82)
    house.make(first)
    recipes = [measured_only(recipe, parts, seed=82 + i % (FRESH + 1)) for i in range(MANY)]
    runs = [house.ordered(each | {"name": f"many-{i}"}) for i, each in enumerate(recipes)]
    for run in runs:
        house.done(run)
    stages = [house.states(run)["evaluate teacher"] for run in runs]
    assert Counter(stages)["Cached"] >= MANY // (FRESH + 1)
    assert list(house.terminal.store.verify()) == []
