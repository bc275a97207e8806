"""Choose what multiplies with a packed weight on the device that holds it."""

import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor

from stillroom.quantization.kernels.dequantization import PackedLinear, TorchKernel


class Kernel(Protocol):
    """y = x Wᵀ + b for one layer."""

    @property
    def name(self) -> str:
        """Return what the report calls it."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out), of the inputs' dtype, for inputs (..., in)."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), computed in float32."""


def choose_kernel(layer: PackedLinear) -> Kernel:
    """Return the fastest kernel that is installed for the layer's device.

    Where that is the one that dequantizes at each call, a warning says why.
    """
    device = layer.packed.qweight.device
    match device.type:
        case "meta":
            return TorchKernel(layer)
        case "cpu":
            reason = _why_not_llvm()
            if reason is None:
                from stillroom.quantization.kernels.llvm_kernel import LlvmKernel

                return LlvmKernel(layer)
        case "cuda":
            reason = _why_not_triton(layer)
            if reason is None:
                from stillroom.quantization.kernels.triton_kernel import TritonKernel

                properties = torch.cuda.get_device_properties(device)
                return TritonKernel(layer, properties.multi_processor_count)
        case other:
            reason = f"no other kernel runs on {other}"
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
        from stillroom.quantization.kernels.llvm_kernel import unsupported
    except (ImportError, OSError) as error:
        return f"llvmlite cannot be loaded ({error}); pip install llvmlite"
    return unsupported()


def _why_not_triton(layer: PackedLinear) -> str | None:
    try:
        from stillroom.quantization.kernels.triton_kernel import cannot_compile, unsupported
    except (ImportError, OSError) as error:
        return f"triton cannot be loaded ({error}); pip install triton"
    capability = torch.cuda.get_device_capability(layer.packed.qweight.device)
    if capability < (8, 0):
        return f"the Triton kernel needs compute capability 8.0, this GPU has {capability}"
    return cannot_compile() or unsupported(layer)
