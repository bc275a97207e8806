"""Run the Triton kernel in Triton's interpreter, on a CPU, and print how far it is off, as JSON.

A process of its own: TRITON_INTERPRET=1 must be set before triton is imported.
"""

import json
from dataclasses import dataclass
from itertools import product

import torch

from stillroom.quantization.kernels.dequantization import PackedLinear
from stillroom.quantization.kernels.triton_kernel import TritonKernel
from stillroom.quantization.packing import pack
from stillroom.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class Case:
    bits: int
    tokens: int
    dtype: torch.dtype = torch.float32
    inputs: int = 192
    outputs: int = 160  # no multiple of a program's width
    group: int = 64
    version: str = "gptq"
    scales: torch.dtype = torch.float16
    bias: bool = True
    mean: float = 0.0


CASES = [
    *(Case(bits, tokens, torch.float16) for bits, tokens in product((2, 3, 4, 8), (1, 3, 16, 17))),
    *(Case(bits, tokens) for bits, tokens in product((2, 3, 4, 8), (1, 2, 5))),
    *(Case(bits, 1, torch.bfloat16, bias=bits == 4) for bits in (3, 4, 8)),
    *(Case(2, tokens, torch.float16, group=group) for tokens in (1, 3) for group in (16, 96, 192)),
    *(Case(3, tokens, torch.float16, group=group) for tokens in (1, 3) for group in (96, 192)),
    *(Case(4, tokens, inputs=2048, group=128) for tokens in (1, 4)),  # in two and more parts
    *(Case(8, tokens, version="gptq_v2", scales=torch.bfloat16) for tokens in (1, 2)),
    *(Case(8, tokens, mean=10.0) for tokens in (1, 2)),
]


def make_layer(case):
    draw = torch.Generator().manual_seed(0)
    groups = (case.outputs, case.inputs // case.group)
    top = 2**case.bits
    packed = pack(
        QuantizedWeight(
            torch.randint(0, top, (case.outputs, case.inputs), generator=draw, dtype=torch.uint8),
            (torch.rand(*groups, generator=draw) / top + 0.01).to(case.scales),
            torch.randint(1, top, groups, generator=draw, dtype=torch.uint8),
            case.bits,
        ),
        case.version,
    )
    bias = torch.randn(case.outputs, generator=draw).to(case.dtype) if case.bias else None
    return PackedLinear(packed, bias, case.bits, case.version)


def measure(case):
    layer = make_layer(case)
    kernel = TritonKernel(layer, processors=16)
    draw = torch.Generator().manual_seed(1)
    x = (torch.randn(1, case.tokens, case.inputs, generator=draw) + case.mean).to(case.dtype)
    exact = x.double() @ layer.dequantize().double().T
    if layer.bias is not None:
        exact += layer.bias.double()
    y = kernel(x)
    return {
        "case": str(case),
        "name": kernel.name,
        "dtype": str(y.dtype).removeprefix("torch."),
        "shape": list(y.shape) == list(exact.shape),
        "difference": float((y.double() - exact).abs().max() / exact.abs().max()),
        "same_again": torch.equal(kernel(x), y),
        "unpacked": torch.equal(kernel.dequantize(torch.float32), layer.dequantize()),
    }


def main():
    print(json.dumps([measure(case) for case in CASES]))


if __name__ == "__main__":
    main()
