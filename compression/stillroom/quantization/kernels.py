"""Choose what multiplies with a packed weight on the device that holds it."""

import warnings
from typing import Literal, Protocol

from torch import Tensor

from stillroom.quantization.dequantization import PackedLinear, TorchKernel


class Kernel(Protocol):
    """y = x Wᵀ + b for one layer."""

    @property
    def name(self) -> str:
        """Return what the report calls it."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in)."""


def choose_kernel(layer: PackedLinear) -> Kernel:
    """Return the fastest kernel that is installed for the layer's device.

    Where that is the one that dequantizes at each call, a warning says why.
    """
    device = layer.packed.qweight.device.type
    if device == "meta":
        return TorchKernel(layer)
    reason = _why_not_llvm() if device == "cpu" else f"no other kernel runs on {device}"
    if reason is None:
        from stillroom.quantization.llvm_kernel import LlvmKernel

        return LlvmKernel(layer)
    warnings.warn(
        f"a packed layer dequantizes its weight at each call, which is slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return TorchKernel(layer)


def fastest_weights(device: str) -> Literal["dense", "packed"]:
    """Return how a quantized model computes fastest on a device: unpacked once, or as it is."""
    return "packed" if device == "cpu" and _why_not_llvm() is None else "dense"


def _why_not_llvm() -> str | None:
    try:
        from stillroom.quantization.llvm_kernel import unsupported
    except (ImportError, OSError) as error:
        return f"llvmlite cannot be loaded ({error}); pip install llvmlite"
    return unsupported()
