"""Say which kernels a quantized model runs on, and how far they are from the dense product."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillroom.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class KernelReport:
    """What a model's packed layers run on, and what that changes."""

    layers: dict[str, int]
    """Packed layers by the name of their kernel."""
    logit_difference: float
    """Largest difference of a logit from that with dequantized weights, over the largest logit."""


@torch.no_grad()
def report_kernels(model: nn.Module, input_ids: Tensor) -> KernelReport:
    """Run `model` on input_ids (sequences, tokens), with its kernels and with dense products."""
    names = Counter(layer.kernel for layer in packed_layers(model))
    ours = model(input_ids=input_ids).logits.float()
    with dequantizing(model):
        theirs = model(input_ids=input_ids).logits.float()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return KernelReport(dict(sorted(names.items())), difference)


@torch.no_grad()
def output_difference(layer: QuantizedLinear, inputs: Tensor) -> float:
    """Return the largest difference of an output from x Wᵀ + b in float64, over the largest output.

    inputs: (..., in).
    """
    exact = inputs.double() @ layer.dequantize().double().T  # (..., out)
    if layer.bias is not None:
        exact += layer.bias.double()
    return float((layer(inputs).double() - exact).abs().max() / exact.abs().max())


def packed_layers(model: nn.Module) -> list[QuantizedLinear]:
    """Return all layers of a model whose weight is packed."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@contextmanager
def dequantizing(model: nn.Module) -> Iterator[None]:
    """Dequantize every packed layer's weight at each call, as a reference, inside the block."""
    layers = packed_layers(model)
    for layer in layers:
        layer.use_torch()
    try:
        yield
    finally:
        for layer in layers:
            layer.use_torch(False)
