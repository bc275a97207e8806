"""Twenty runs that are ordered at once, as the schedules of a team may."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

from tests.flows.house import House, small_recipe
from tests.flows.terminal import assert_sound

MANY = 20
MANY_SECONDS = 480
"""Two processors have some twenty seconds of work for each of them."""
FRESH = 4
"""So many of them make something, and the others find it Cached, or make the same beside them."""


def order_many(house: House, recipe: dict[str, Any], parts: Path, seed: int) -> None:
    """Order them, and see that all end well and that the store is sound."""
    first = _measured_only(recipe, parts) | {"seed": seed}
    house.make(first)
    runs = [
        house.ordered(copy.deepcopy(first) | {"name": f"many-{i}", "seed": seed + i % (FRESH + 1)})
        for i in range(MANY)
    ]
    for run in runs:
        house.done(run, seconds=MANY_SECONDS)
    stages = [house.states(run)["evaluate teacher"] for run in runs]
    assert Counter(stages)["Cached"] >= MANY // (FRESH + 1)
    assert_sound(house.terminal)


def _measured_only(recipe: dict[str, Any], parts: Path) -> dict[str, Any]:
    """Return a recipe that measures the teacher, and does no more."""
    small = small_recipe(recipe, parts) | {"adapters": []}
    for section in ("distillation", "quantization", "publish"):
        del small[section]
    return small
