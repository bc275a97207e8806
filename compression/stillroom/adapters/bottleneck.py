"""Bottleneck adapters (1902.00751, 2005.00247), after the sublayers of each block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.adapters.flattened import BatchRows
from stillroom.adapters.options import BottleneckOptions
from stillroom.adapters.part import Part
from stillroom.adapters.places import adaptable_stacks
from stillroom.adapters.probe import device_of, key_of
from stillroom.adapters.sublayers import find_sublayers
from stillroom.training.options import derived_seed

# The paper's, of a normal cut at two deviations.
_DOWN_DEVIATION = 1e-2
# With the paper's 1e-2 here too, a fresh one of width 32 moves the outputs of SmolLM2 by 1.6 %;
# so it moves them by 0.016 %, and gradients still reach D.
_UP_DEVIATION = 1e-4
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


class Bottleneck(nn.Module):
    """h + U act(D h + b) + c with D (width, hidden) and U (hidden, width), in float32."""

    def __init__(self, hidden: int, options: BottleneckOptions, generator: torch.Generator) -> None:
        super().__init__()
        self.D = nn.Parameter(_normal((options.width, hidden), _DOWN_DEVIATION, generator))
        self.b = nn.Parameter(torch.zeros(options.width))
        self.U = nn.Parameter(_normal((hidden, options.width), _UP_DEVIATION, generator))
        self.c = nn.Parameter(torch.zeros(hidden))
        self.activation = _ACTIVATIONS[options.activation]

    def forward(self, h: Tensor) -> Tensor:
        """Return what comes out, (..., hidden), for a sublayer's output h (..., hidden)."""
        inner = self.activation(functional.linear(h.to(self.D.dtype), self.D, self.b))
        return h + functional.linear(inner, self.U, self.c).to(h.dtype)


class NormOffset(nn.Module):
    """h · (1 + scale) + shift: a norm whose own scale and shift are trained, from where they are.

    A norm without a bias has no shift.
    """

    def __init__(self, norm: nn.Module, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(hidden))
        shifts = getattr(norm, "bias", None) is not None
        self.shift = nn.Parameter(torch.zeros(hidden)) if shifts else None

    def forward(self, h: Tensor) -> Tensor:
        """Return the norm's output (..., hidden) with the offsets."""
        scaled = h * (1 + self.scale)
        return scaled if self.shift is None else scaled + self.shift


class BottleneckAdapter(Part):
    """Bottlenecks on the outputs of sublayers, before their dropout, norm and residual.

    `houlsby` trains the blocks' layer norms as well, as its paper does (1902.00751, 2.1);
    `pfeiffer` trains nothing but bottlenecks after the feed-forward layers (2005.00247, 3.1).
    Classifiers have their heads beside it.
    """

    def __init__(self, base: nn.Module, options: BottleneckOptions, seed: int) -> None:
        super().__init__()
        self.changes = nn.ModuleDict()
        self._batch = BatchRows(self, base)
        sublayers = find_sublayers(base)
        generator = torch.Generator().manual_seed(derived_seed(seed, "bottleneck"))
        for each in sublayers:
            both = options.placement == "houlsby"
            for name in (*(each.attentions if both else ()), each.feed_forward):
                self._put(base, name, Bottleneck(each.hidden, options, generator))
        if options.placement == "houlsby":
            hidden = {each.hidden for each in sublayers}
            for name in norm_names(base, hidden):
                norm = base.get_submodule(name)
                self._put(base, name, NormOffset(norm, norm.weight.numel()))  # type: ignore[operator]

    def _put(self, base: nn.Module, name: str, change: nn.Module) -> None:
        layer = base.get_submodule(name)
        self.changes[key_of(name)] = change.to(device_of(layer))
        self.hook(layer, partial(self._change, key_of(name)))

    def _change(self, key: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self.rows is False:
            return output
        if isinstance(output, tuple):  # a mixture may return its router's logits too
            return (self._batch.change(self.rows, output[0], self.changes[key]), *output[1:])
        return self._batch.change(self.rows, output, self.changes[key])


def norm_names(base: nn.Module, hidden: set[int]) -> list[str]:
    """Return the full names of the norms in the blocks that scale one of these widths.

    They are the modules with a weight of one dimension; norms of single heads are narrower.
    """
    return [
        f"{stack}.{name}"
        for stack, blocks in adaptable_stacks(base).items()
        for name, module in blocks.named_modules()
        if (weight := module._parameters.get("weight")) is not None
        and weight.dim() == 1
        and weight.numel() in hidden
    ]


def _normal(shape: tuple[int, int], deviation: float, generator: torch.Generator) -> Tensor:
    values = torch.empty(shape)
    nn.init.trunc_normal_(
        values, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator
    )
    return values
