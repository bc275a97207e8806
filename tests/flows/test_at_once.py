"""Runs at the same time on one server: of one recipe, and of many that wait for one another."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import House, small_recipe
from tests.flows.many import order_many

pytestmark = [pytest.mark.integration, pytest.mark.service]


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
def test_of_many_runs_some_wait_and_all_end_well(
    house: House, recipe: dict[str, Any], parts: Path
) -> None:
    order_many(house, recipe, parts, seed=82)
