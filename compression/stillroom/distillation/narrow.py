"""Make a student narrower than its teacher: fewer channels, neurons and heads.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), section 2: rank by activations, trim, then distil.
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.blocks import find_blocks
from stillroom.data.examples import Examples
from stillroom.distillation.construction import construct
from stillroom.distillation.importance import measure_importance
from stillroom.distillation.width_axes import Axes, Items, select
from stillroom.distillation.width_probe import find_axes
from stillroom.distillation.width_sizes import FIELD, Sizes, read_sizes, resized
from stillroom.errors import RecipeError

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Width:
    """How wide a student is to be, None where it is as wide as its teacher.

    hidden_size: channels of the residual stream. intermediate_size: neurons of each feed-forward
    layer. attention_heads: query heads of each layer.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    attention_heads: int | None = None


def narrow_student(model: Model, width: Width, rows: Examples, *, batch_rows: int = 4) -> Model:
    """Return a new model of the same class with the teacher's most important parts.

    What is kept is what `measure_importance` ranks first on `rows`, the lower number among equals,
    in the teacher's order: channels once for the whole model, neurons and heads for each block.
    Heads that share a key-value head stay or go together, so attention_heads must be a multiple of
    their number. A head keeps its channels: where the config has no head_dim, hidden_size and
    attention_heads must change by the same factor.

    Norms take their mean and variance over the kept channels alone, and their weights are not
    corrected for it: a factor that is right for dead channels would be wrong for others, and the
    paper leaves it to training. The same holds for norms over all heads together.

    Shares no memory with the teacher. Saves and loads as any model of its kind.

    Raises:
        RecipeError: a width is below 1 or above the teacher's, the widths do not fit together, or
            it cannot be proved which parameters they concern (mixtures, encoders with decoders,
            models whose code computes something from a width).
        DataError: there are no tokens to measure on.
    """
    before = read_sizes(model.config)
    after = _target(before, width)
    config = resized(model.config, after)
    axes = find_axes(model)
    kept = choose_items(model, axes, before, after, rows, batch_rows)
    blocks, _ = find_blocks(model)
    state = model.state_dict()

    def value(name: str) -> Tensor:
        return select(name, state[name], axes, kept, before, blocks)

    return construct(type(model), config, value, model)


def choose_items(
    model: PreTrainedModel, axes: Axes, before: Sizes, after: Sizes, rows: Examples, batch_rows: int
) -> Items:
    """Return which parts of a model of sizes `before` one of sizes `after` keeps, ascending."""
    importance = measure_importance(model, axes, before, rows, batch_rows)
    return Items(
        _largest(importance.channels, after.hidden),
        tuple(_largest(each, after.intermediate) for each in importance.neurons),
        tuple(_largest(each, after.groups) for each in importance.groups),
    )


def _largest(importance: Tensor, count: int) -> Tensor:
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:count].sort().values


def _target(teacher: Sizes, width: Width) -> Sizes:
    """Return the student's sizes, or refuse them."""
    largest = Width(teacher.hidden, teacher.intermediate, teacher.heads)
    wanted: dict[str, int] = {}
    for name in (field.name for field in fields(Width)):
        limit, value = getattr(largest, name), getattr(width, name)
        wanted[name] = limit if value is None else value
        if not 1 <= wanted[name] <= limit:
            raise RecipeError(
                f"{FIELD}.{name}: expected 1 to {limit}, as wide as the teacher is, got {value}"
            )
    hidden, heads = wanted["hidden_size"], wanted["attention_heads"]
    if heads % teacher.ratio:
        raise RecipeError(
            f"{FIELD}.attention_heads: expected a multiple of {teacher.ratio}, the teacher's heads "
            f"for each key-value head, got {heads}"
        )
    if not teacher.free and hidden != heads * teacher.head_dim:
        raise RecipeError(
            f"{FIELD}: this kind of model has hidden_size / attention_heads channels a head, and "
            f"the teacher's have {teacher.head_dim}; expected that of the student too, got "
            f"hidden_size {hidden} with {heads} attention_heads; change both, hidden_size to "
            f"{heads * teacher.head_dim}"
        )
    return replace(
        teacher,
        hidden=hidden,
        intermediate=wanted["intermediate_size"],
        heads=heads,
        groups=heads // teacher.ratio,
    )
