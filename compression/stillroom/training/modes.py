"""How a model is set for a while: for training or not, and what it keeps of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from stillroom.errors import RecipeError


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the model for training, with dropout, or not; as it was before afterwards."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def recomputing(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Have the activations of blocks made again in the backward pass, where that is asked for.

    Raises:
        RecipeError: the model cannot.
    """
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            f"gradient_checkpointing: {type(model).__name__} cannot make its activations again; "
            "set it to false, or take fewer batch_rows"
        )
    able = cast(Any, model)
    # transformers 5.17 calls it gradient checkpointing, 5.23 both.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(able, f"{kind}_checkpointing_enable")()
    try:
        yield
    finally:
        getattr(able, f"{kind}_checkpointing_disable")()
