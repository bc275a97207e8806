"""A model whose blocks hold quantized layers, without going through a checkpoint."""

from torch import nn

from stillroom.blocks import find_blocks, find_linears
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack
from stillroom.quantization.rounding import round_to_nearest


def quantize_blocks(model: nn.Module) -> nn.Module:
    """Replace every linear in the blocks by its 8-bit form, in place."""
    for block in find_blocks(model)[1]:
        for name, linear in find_linears(block).items():
            weight = round_to_nearest(linear.weight.detach(), QuantizationOptions(8, 16)).weight
            parent, _, last = name.rpartition(".")
            packed = QuantizedLinear(pack(weight), linear.bias, 8)
            setattr(block.get_submodule(parent), last, packed)
    return model
