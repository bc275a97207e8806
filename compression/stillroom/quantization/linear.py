"""A linear layer that keeps its weight packed and multiplies with it as it is."""

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from stillroom.quantization.kernels.choose import Kernel, choose_kernel
from stillroom.quantization.kernels.dequantization import PackedLinear, TorchKernel
from stillroom.quantization.packing import PARTS, CheckpointFormat, PackedWeight


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W of 2, 3, 4 or 8 bits, in the tensors of a GPTQ checkpoint.

    Where a kernel can, the forward pass reads the packed weight; the backward pass dequantizes it,
    so that it never stays in memory. Gradients reach the inputs, not the weight: it is frozen.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    weight = None  # there is none; T5 asks before it multiplies

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
        for part, tensor in packed.tensors().items():
            self.register_buffer(part, tensor)
        self.register_buffer("bias", bias)
        self._dequantizing = False
        self._kernel: Kernel | None = None
        self._of_kernel: dict[str, Tensor | None] = {}
        self._take_number()

    @property
    def kernel(self) -> str:
        """The name of what multiplies here: "llvm-int4", "triton-int4"; "torch" dequantizes."""
        return self._current_kernel().name

    def use_torch(self, dequantizing: bool = True) -> None:
        """Dequantize at each call, as a reference, or go back to the fastest kernel."""
        self._dequantizing = dequantizing
        self._forget_kernel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight, (out, in), computed in float32."""
        return self._parts().dequantize(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), for inputs (..., in) of any floating dtype."""
        if inputs.requires_grad and torch.is_grad_enabled():
            outputs: Tensor = _FrozenProduct.apply(inputs, self)  # type: ignore[no-untyped-call]
            return outputs
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self._multiply(inputs)
        return self._current_kernel()(inputs)  # at once: a small layer's product is as short

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
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, kernel={self.kernel}"
        )

    def _multiply(self, inputs: Tensor) -> Tensor:
        if _is_leaving():
            return TorchKernel(self._parts())(inputs)
        if torch.compiler.is_compiling():
            product: Tensor = _multiply_numbered(inputs, self._number)
            return product
        return self._current_kernel()(inputs)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        if _is_leaving() or torch.compiler.is_compiling():
            return self._parts().dequantize(dtype)
        return self._current_kernel().dequantize(dtype)

    def _take_number(self) -> None:
        self._number = next(_NUMBERS)
        _NUMBERED[self._number] = self

    def _current_kernel(self) -> Kernel:
        """Return the kernel for the tensors that are here now, made at the first call."""
        kernel, own, known = self._kernel, self._buffers, self._of_kernel
        # A loop over the names would take longer than a small layer's product.
        if (
            kernel is None
            or own["qweight"] is not known["qweight"]
            or own["qzeros"] is not known["qzeros"]
            or own["scales"] is not known["scales"]
            or own["g_idx"] is not known["g_idx"]
            or own["bias"] is not known["bias"]
        ):
            parts = self._parts()
            kernel = TorchKernel(parts) if self._dequantizing else choose_kernel(parts)
            self._kernel, self._of_kernel = kernel, dict(own)
        return kernel

    def _parts(self) -> PackedLinear:
        packed = PackedWeight(*(getattr(self, part) for part in PARTS))
        return PackedLinear(packed, self.bias, self.bits, self.checkpoint_format)

    def _forget_kernel(self) -> None:
        self._kernel = None
        self._of_kernel = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantizedLinear":
        # A change of the model's dtype must not round the scales again: the weight would move.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.scales.device)
        self._forget_kernel()  # memory may have moved below the same tensors
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._forget_kernel()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes: not the kernel, which holds addresses."""
        return {**self.__dict__, "_kernel": None, "_of_kernel": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_number()


# A compiled graph cannot hold a kernel, which is addresses of tensors. It holds a layer's number.
_NUMBERS = count()
_NUMBERED: WeakValueDictionary[int, QuantizedLinear] = WeakValueDictionary()


@torch.library.custom_op("stillroom::multiply_packed", mutates_args=())
def _multiply_numbered(inputs: Tensor, number: int) -> Tensor:
    return _NUMBERED[number]._current_kernel()(inputs)


@_multiply_numbered.register_fake
def _(inputs: Tensor, number: int) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], _NUMBERED[number].out_features))


# Before, Dynamo takes every compilation for an export.
_EXPORTS_ARE_KNOWN = torch.__version__ >= "2.13"


def _is_leaving() -> bool:
    """Return whether a graph is made that is to run elsewhere, where no layer has this number."""
    if torch.compiler.is_dynamo_compiling():
        return _EXPORTS_ARE_KNOWN and torch.compiler.is_exporting()
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b whose backward pass dequantizes W anew instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer._unpacked(gradient.dtype), None
