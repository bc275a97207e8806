"""A part of the road: one kind of stage with what it takes, and nothing that comes after it."""

from collections.abc import Mapping
from typing import Literal, get_args

from stillroom.config import Recipe
from stillroom.errors import RecipeError
from tasks.stages import (
    CACHE_TEACHER,
    DISTILL_STUDENT,
    EVALUATE_MODEL,
    IMPORT_MODEL,
    MERGE_ADAPTER,
    PREPARE_DATA,
    QUANTIZE_MODEL,
    TRAIN_ADAPTER,
    TRIM_VOCABULARY,
    TUNE_TEACHER,
    Order,
    Stage,
)

Part = Literal["teacher", "data", "teacher_cache", "student", "quantized", "adapters", "evaluation"]
PARTS: tuple[Part, ...] = get_args(Part)
MADE_BY: Mapping[Part, tuple[Stage, ...]] = {
    "teacher": (IMPORT_MODEL, TRIM_VOCABULARY, TUNE_TEACHER),
    "data": (PREPARE_DATA,),
    "teacher_cache": (CACHE_TEACHER,),
    "student": (DISTILL_STUDENT,),
    "quantized": (QUANTIZE_MODEL,),
    "adapters": (TRAIN_ADAPTER, MERGE_ADAPTER),
    "evaluation": (EVALUATE_MODEL,),
}


def without_more(recipe: Recipe, part: Part) -> Recipe:
    """Return the recipe without what is made only to judge the result, unless that is the part."""
    return recipe if part == "evaluation" else recipe.model_copy(update={"controls": ()})


def needed_for(part: Part, orders: dict[str, Order]) -> list[str]:
    """Return the keys of a part's orders and of all that they take, in their order.

    Raises:
        RecipeError: the recipe has no such part.
    """
    needed = {key for key, order in orders.items() if order.stage in MADE_BY[part]}
    if not needed:
        made = {order.stage for order in orders.values()}
        parts = [name for name, stages in MADE_BY.items() if made & set(stages)]
        raise RecipeError(
            f"this recipe makes no {part.replace('_', ' ')}: take one of {', '.join(parts)}, or "
            "give it the section that is missing"
        )
    for key in reversed(orders):
        if key in needed:
            needed.update(orders[key].inputs.values())
    return [key for key in orders if key in needed]
