"""Measure how much a model's channels, neurons and heads do on rows of text.

Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section
2.2: importance is read off activations on a few calibration rows, without gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import find_blocks, find_linears
from stillroom.data.examples import Examples
from stillroom.distillation.width_axes import Axes, Kind, block_of
from stillroom.distillation.width_sizes import FIELD, Sizes
from stillroom.errors import DataError, RecipeError


@dataclass(frozen=True)
class Importance:
    """What is kept first: channels (hidden,), per block neurons (intermediate,), groups (groups,).

    All float64, on the CPU.
    """

    channels: Tensor
    neurons: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]


@torch.no_grad()
def measure_importance(
    model: PreTrainedModel, axes: Axes, sizes: Sizes, rows: Examples, batch_rows: int = 4
) -> Importance:
    """Return the importance of every part of the model on all real tokens of `rows`.

    Of a channel: the mean absolute output of the norms in the blocks, over norms and tokens. Of a
    neuron: the mean absolute input of the layer that sums over the neurons of its block. Of a head:
    the mean L2 norm of its part of the input of the layer that joins the heads; a group of heads
    with one key-value head has the sum of theirs.

    Raises:
        DataError: there are no tokens.
        RecipeError: a block has no norm, or not one layer that sums over neurons, and over heads.
    """
    if rows.tokens == 0:
        raise DataError(
            f"{FIELD}: importance is measured on calibration rows, and there are none; set "
            "data.calibration_rows to 1 or more"
        )
    places = _places(model, axes)
    sums = {name: torch.zeros(0) for name in places}
    mask = torch.ones(0)

    def add(name: str, values: Tensor) -> None:
        real = values.reshape(-1, values.shape[-1])[mask]  # (tokens, width)
        if places[name] == "groups":
            each = real.float().reshape(len(real), sizes.heads, sizes.head_dim).norm(dim=-1)
            each = each.reshape(len(real), sizes.groups, sizes.ratio).sum(-1)
        else:
            each = real.float().abs()
        total = each.sum(0).cpu().double()
        sums[name] = sums[name] + total if len(sums[name]) else total

    hooks = [_hook(model.get_submodule(name), kind, name, add) for name, kind in places.items()]
    training = model.training
    model.train(False)
    try:
        for start in range(0, len(rows), batch_rows):
            part = rows.take(slice(start, start + batch_rows)).without_shared_padding()
            ids, ones = part.input_ids.to(model.device), part.attention_mask.to(model.device)
            mask = ones.bool().flatten()
            model(input_ids=ids, attention_mask=ones)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return _collected(model, places, {name: each / rows.tokens for name, each in sums.items()})


def _collected(
    model: PreTrainedModel, places: dict[str, Kind], means: dict[str, Tensor]
) -> Importance:
    blocks, found = find_blocks(model)

    def per_block(kind: Kind) -> tuple[Tensor, ...]:
        return tuple(
            means[name]
            for block in range(len(found))
            for name, each in places.items()
            if each == kind and block_of(name, blocks) == block
        )

    channels = torch.stack(per_block("channels")).mean(0)
    return Importance(channels, per_block("neurons"), per_block("groups"))


def _places(model: PreTrainedModel, axes: Axes) -> dict[str, Kind]:
    """Return the modules to listen to, by dotted name: norms, and layers that sum over a width."""
    blocks, found = find_blocks(model)
    linears = find_linears(model)
    places: dict[str, Kind] = {}
    for name, each in axes.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or block_of(name, blocks) is None:
            continue
        if module in linears:
            for axis in each:
                if axis is not None and axis.summed and axis.kind != "channels":
                    places[module] = axis.kind
        elif len(each) == 1 and each[0] is not None and each[0].kind == "channels":
            places[module] = "channels"
    for block in range(len(found)):
        kinds = [kind for name, kind in places.items() if block_of(name, blocks) == block]
        if kinds.count("neurons") != 1 or kinds.count("groups") != 1 or "channels" not in kinds:
            raise RecipeError(
                f"{FIELD}: norms, one layer that sums over neurons and one that joins the heads "
                f"expected in each block; block {block} of this {type(model).__name__} has "
                f"{kinds.count('channels')}, {kinds.count('neurons')} and "
                f"{kinds.count('groups')}; take another teacher"
            )
    return places


def _hook(module: nn.Module, kind: Kind, name: str, add: Callable[[str, Tensor], None]) -> Any:
    if kind == "channels":
        return module.register_forward_hook(lambda _, __, output: add(name, output))
    return module.register_forward_pre_hook(lambda _, inputs: add(name, inputs[0]))
