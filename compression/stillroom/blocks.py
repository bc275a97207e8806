"""Where a model's repeated blocks and their linear layers are, read off its module tree."""

from typing import cast

import torch
from torch import Tensor, nn

from stillroom.errors import RecipeError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the model's repeated blocks.

    They are the items of the ModuleList with the most parameters among those whose items share a
    class and each hold a linear layer; no table of architectures is needed.

    Raises:
        RecipeError: no ModuleList qualifies.
    """
    found: tuple[str, nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(item) for item in module}) != 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most and all(find_linears(item) for item in module):
            found, most = (name, module), size
    if found is None:
        raise RecipeError(
            f"expected a model with repeated blocks that hold linear layers; "
            f"{type(model).__name__} has no such ModuleList; use a transformer"
        )
    return found


def find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return every nn.Linear and transformers' Conv1D below `module`, in definition order.

    The keys are dotted names relative to `module`. Subclasses of nn.Linear are left out: their
    forward may do something else with the weight.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return {name: child for name, child in module.named_modules() if type(child) in kinds and name}


def read_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), whichever way it is stored."""
    weight = cast(Tensor, linear.weight).detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


@torch.no_grad()
def write_weight(linear: nn.Module, values: Tensor) -> None:
    """Replace the weight of a linear layer by `values`, (out, in), in place."""
    read_weight(linear).copy_(values)
