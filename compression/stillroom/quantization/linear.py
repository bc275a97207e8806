"""A linear layer that keeps its weight packed and dequantizes it when it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.quantization.packing import (
    CheckpointFormat,
    PackedWeight,
    has_plain_groups,
    unpack_rows,
    unpack_zeros,
)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W of 2, 3, 4 or 8 bits, in the tensors of a GPTQ checkpoint.

    The whole weight is dequantized at each call and again in the backward pass, so that it never
    stays in memory. Gradients reach the inputs, not the weight: it is frozen.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None,
        bits: int,
        checkpoint_format: CheckpointFormat = "gptq",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.checkpoint_format: CheckpointFormat = checkpoint_format
        self.in_features = packed.g_idx.shape[0]
        self.out_features = packed.scales.shape[1]
        self.register_buffer("qweight", packed.qweight)
        self.register_buffer("qzeros", packed.qzeros)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("g_idx", packed.g_idx)
        self.register_buffer("bias", bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        return self._transposed(dtype).T

    def _transposed(self, dtype: torch.dtype) -> Tensor:
        integers = unpack_rows(self.qweight, self.bits)  # (in, out)
        zeros = unpack_zeros(self.qzeros, self.bits, self.checkpoint_format).float()
        scales = self.scales.float()  # (groups, out)
        groups = scales.shape[0]
        if has_plain_groups(self.g_idx, groups):
            values = integers.view(groups, -1, self.out_features).float()
            values.sub_(zeros[:, None]).mul_(scales[:, None])
            return values.view(self.in_features, self.out_features).to(dtype)
        index = self.g_idx.long()
        return ((integers.float() - zeros[index]) * scales[index]).to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), for inputs (..., in) of any floating dtype."""
        outputs: Tensor = _FrozenProduct.apply(inputs, self)  # type: ignore[no-untyped-call]
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return a dense layer with the same weight."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        dense.weight = nn.Parameter(self.dequantize(dtype).contiguous())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype))
        return dense

    def extra_repr(self) -> str:
        """Return what print shows of this layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantizedLinear":
        # A change of the model's dtype must not round the scales again: the weight would move.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.scales.device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ whose backward pass dequantizes W anew instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.dequantize(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantize(gradient.dtype), None
