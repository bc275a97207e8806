"""What the dimensions of a model's tensors count: channels, neurons, or groups of heads."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.distillation.width_sizes import Sizes

Kind = Literal["channels", "neurons", "groups"]


@dataclass(frozen=True)
class Axis:
    """What a dimension of a tensor counts, and how it lies there.

    parts: the dimension is these parts side by side; in each, an item has that many entries in a
    row. summed: a linear layer sums over the dimension.
    """

    kind: Kind
    parts: tuple[int, ...]
    summed: bool

    def entries(self, items: Tensor, total: int) -> Tensor:
        """Return the dimension's entries, int64, that belong to `items` of `total`, (items,)."""
        starts = [total * sum(self.parts[:i]) for i in range(len(self.parts))]
        return torch.cat(
            [
                (start + items[:, None] * size + torch.arange(size)).flatten()
                for start, size in zip(starts, self.parts, strict=True)
            ]
        )


Axes = dict[str, tuple[Axis | None, ...]]


@dataclass(frozen=True)
class Items:
    """Which channels, and for each block which neurons and groups, all counted from 0."""

    channels: Tensor
    neurons: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]

    def of(self, kind: Kind, block: int | None) -> Tensor:
        """Return those of one block; channels are the same everywhere."""
        if kind == "channels":
            return self.channels
        assert block is not None
        return (self.neurons if kind == "neurons" else self.groups)[block]


def totals(sizes: Sizes) -> dict[Kind, int]:
    """Return how many items of each kind a model has, a block."""
    return {"channels": sizes.hidden, "neurons": sizes.intermediate, "groups": sizes.groups}


def block_of(name: str, blocks: str) -> int | None:
    """Return the number of the block that a dotted name is in, below the list named `blocks`."""
    if not name.startswith(f"{blocks}."):
        return None
    return int(name.removeprefix(f"{blocks}.").partition(".")[0])


def select(
    name: str, tensor: Tensor, axes: Axes, items: Items, sizes: Sizes, blocks: str
) -> Tensor:
    """Return the part of a model's tensor that belongs to `items`; `sizes` are the model's own."""
    for dim, axis in enumerate(axes[name]):
        if axis is not None:
            total = totals(sizes)[axis.kind]
            chosen = items.of(axis.kind, block_of(name, blocks))
            tensor = tensor.index_select(dim, axis.entries(chosen, total).to(tensor.device))
    return tensor
