"""Make a packed weight dense: for the backward pass, for export, and where no kernel runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.quantization.packing import (
    CheckpointFormat,
    PackedWeight,
    has_plain_groups,
    unpack_rows,
    unpack_zeros,
)


@dataclass(frozen=True)
class PackedLinear:
    """What a linear layer is made of whose weight is packed."""

    packed: PackedWeight
    bias: Tensor | None  # (out,)
    bits: int
    checkpoint_format: CheckpointFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        packed = self.packed
        integers = unpack_rows(packed.qweight, self.bits)  # (in, out)
        zeros = unpack_zeros(packed.qzeros, self.bits, self.checkpoint_format).float()
        scales = packed.scales.float()  # (groups, out)
        groups, outputs = scales.shape
        if has_plain_groups(packed.g_idx, groups):
            values = integers.view(groups, -1, outputs).float()
            values.sub_(zeros[:, None]).mul_(scales[:, None])
            return values.view(-1, outputs).to(dtype).T
        index = packed.g_idx.long()
        return ((integers.float() - zeros[index]) * scales[index]).to(dtype).T


@dataclass(frozen=True)
class TorchKernel:
    """y = x Wᵀ + b with W dequantized at each call; for every device and floating dtype."""

    layer: PackedLinear
    name: str = field(default="torch", init=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in)."""
        bias = self.layer.bias
        bias = None if bias is None else bias.to(inputs.dtype)
        return functional.linear(inputs, self.layer.dequantize(inputs.dtype), bias)
