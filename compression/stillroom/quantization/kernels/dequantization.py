"""Make a packed weight dense: for the backward pass, for export, and where no kernel runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from stillroom.errors import CorruptedError
from stillroom.quantization.packing import (
    WORD,
    CheckpointFormat,
    PackedWeight,
    has_plain_groups,
    unpack_rows,
    unpack_zeros,
    values_per_unit,
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
        # A compiled graph cannot look at g_idx, and follows it.
        if not torch.compiler.is_compiling() and has_plain_groups(packed.g_idx, groups):
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
        return functional.linear(inputs, self.dequantize(inputs.dtype), bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        return self.layer.dequantize(dtype)


def require_fit(layer: PackedLinear) -> None:
    """Refuse tensors that are not those of one layer; a kernel does not look where it reads.

    Raises:
        CorruptedError: the tensors do not fit each other.
    """
    packed, bits = layer.packed, layer.bits
    (inputs,), (groups, outputs) = packed.g_idx.shape, packed.scales.shape
    unit = values_per_unit(bits)
    first, last = int(packed.g_idx.min()), int(packed.g_idx.max())
    fits = (
        packed.qweight.shape == (inputs * bits // WORD, outputs)
        and packed.qzeros.shape == (groups, outputs * bits // WORD)
        and inputs % unit == outputs % unit == 0
        and packed.qweight.dtype == packed.qzeros.dtype == torch.int32
        and (layer.bias is None or layer.bias.shape == (outputs,))
        and 0 <= first <= last < groups
    )
    if not fits:
        shapes = {name: tuple(tensor.shape) for name, tensor in packed.tensors().items()}
        raise CorruptedError(
            f"expected the tensors of one layer of {bits} bits, {inputs} inputs and {outputs} "
            f"outputs in {groups} groups, got {shapes} and columns of groups {first} to {last}; "
            "write the checkpoint again"
        )
