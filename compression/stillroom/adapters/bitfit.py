"""Biases alone (BitFit, 2106.10199), as offsets of what the layers give."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.flattened import BatchRows, sees_rows
from stillroom.adapters.part import Part
from stillroom.adapters.probe import device_of, key_of
from stillroom.blocks import find_linears
from stillroom.errors import RecipeError
from stillroom.quantization.linear import QuantizedLinear


class BitFitAdapter(Part):
    """An offset, zero at the start, on the output of each layer that has a bias.

    As in the paper these are all bias terms of the backbone: those of the linear layers and layer
    norms in the blocks, and beside them those of the embeddings' norm, of the last norm and of the
    pooler. A head is none of them: a classifier has a new one beside it, that of a language model
    stays.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        names = biased_names(base)
        if not names:
            raise RecipeError(
                f"bitfit: expected a base whose layers have biases, {type(base).__name__} has none "
                "outside its head; use lora or bottleneck"
            )
        self.offsets = nn.ParameterDict()
        self._batch = BatchRows(self, base)
        for name in names:
            layer = base.get_submodule(name)
            bias: Any = layer.bias
            offset = torch.zeros(bias.shape, device=device_of(layer))
            self.offsets[key_of(name)] = nn.Parameter(offset)
            self.hook(layer, partial(self._add, key_of(name)))
        self.alone = not sees_rows(base, names)

    def _add(self, key: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        offset: Tensor = self.offsets[key]
        return self._batch.change(self.rows, output, lambda own: own + offset)


def biased_names(base: nn.Module) -> list[str]:
    """Return the full names of the backbone's layers with biases, in definition order."""
    backbone = getattr(base, "base_model", base)
    linears = find_linears(base)
    inside = {id(module) for module in backbone.modules()}
    return [
        name
        for name, module in base.named_modules()
        if id(module) in inside
        and (name in linears or isinstance(module, QuantizedLinear | nn.LayerNorm))
        and getattr(module, "bias", None) is not None
    ]
