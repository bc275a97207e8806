"""Weights as GGUF stores them: blocks of 32 columns, each with its own 16-bit scale.

    type   a block                                    weight
    Q4_0   scale, 32 × 4 bits                         scale · (q − 8)
    Q4_1   scale, minimum, 32 × 4 bits                scale · q + minimum
    Q5_0   scale, 32 × the fifth bit, 32 × 4 bits     scale · (q − 16)
    Q8_0   scale, 32 × 8 bits                         scale · q

Ours is scale · (q − zero), so only q − zero matters: 2 and 3 bits always fit Q4_0, whatever their
zero points. Q4_1 rounds scale · zero to float16; the others are exact.
"""

from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.errors import MismatchError, NotFiniteError
from stillroom.quantization.weight import QuantizedWeight

BlockType = Literal["Q4_0", "Q4_1", "Q5_0", "Q8_0"]
AsymmetricType = Literal["Q4_1", "Q5_0"]
BLOCK = 32
HALF_BITS = 11  # of a float16's significand, the implicit one among them
HALF_UNIT = 2.0**-24  # smallest positive float16


def choose_type(weight: QuantizedWeight, asymmetric: AsymmetricType = "Q4_1") -> BlockType:
    """Return the smallest type that holds this weight; `asymmetric` where 4 bits need a zero point.

    Raises:
        MismatchError: no type holds it.
    """
    if weight.group_size % BLOCK:
        raise MismatchError(
            f"expected groups of a multiple of {BLOCK} columns, which share a scale in GGUF; "
            f"{weight.group_size} came; quantize with group_size 32, 64, 128 or -1"
        )
    low, high = _span(weight)
    if low >= -8 and high <= 7:
        return "Q4_0"
    if weight.bits <= 4:
        return asymmetric
    if low >= -128 and high <= 127:
        return "Q8_0"
    raise MismatchError(
        f"expected 8-bit integers within -128 to 127 of their zero points, as Q8_0 holds them; "
        f"{low} to {high} came; quantize 8 bits with symmetric: true"
    )


def encode_blocks(weight: QuantizedWeight, kind: BlockType) -> NDArray[np.uint8]:
    """Return the bytes of a weight (out, in) as GGUF stores them, (out, in / 32 · block bytes).

    Raises:
        NotFiniteError: a scale or a minimum is beyond float16.
    """
    out, columns = weight.integers.shape
    shape = (out, columns // BLOCK, BLOCK)
    repeat = weight.group_size // BLOCK
    scales = weight.scales.half().repeat_interleave(repeat, 1)[..., None]  # (out, blocks, 1)
    zeros = weight.zeros.short().repeat_interleave(repeat, 1)[..., None]  # (out, blocks, 1)
    integers = weight.integers.short().view(shape)  # (out, blocks, 32)
    match kind:
        case "Q4_0":
            parts = [scales, _nibbles(integers - zeros + 8)]
        case "Q4_1":
            minimum = (-scales.float() * zeros).half()
            parts = [scales, minimum, _nibbles(integers)]
        case "Q5_0":
            shifted = integers - zeros + 16  # 0..31
            parts = [scales, _fifth_bits(shifted), _nibbles(shifted & 15)]
        case "Q8_0":
            parts = [scales, (integers - zeros).to(torch.int8)]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise NotFiniteError(f"a scale or a minimum of {kind} is beyond float16; quantize again")
    encoded = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 2)
    return encoded.view(out, -1).numpy()


def round_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight with the nearest scales whose product with the zero point is a float16.

    Q4_1 then holds it exactly, but it is another weight: a scale changes by up to 0.75 %, which is
    more than what Q4_1 loses without it. So let it come before the integers are chosen.
    """
    scales = weight.scales.double()
    _, exponents = torch.frexp(scales)
    # A float16 is a whole number of units, which grow with the exponent and end at 2⁻²⁴.
    units = torch.ldexp(torch.ones_like(scales), exponents - HALF_BITS).clamp_min(HALF_UNIT)
    counts = (scales / units).long()  # 0..2047
    rounded = _exact_counts()[weight.zeros.long(), counts] * units
    return replace(weight, scales=rounded.to(weight.scales.dtype))


@cache
def _exact_counts() -> Tensor:
    """Return the nearest exact count for each zero point 0..15 and count 0..2047, (16, 2048).

    A product of whole numbers is a float16 if it has 11 bits without its trailing zeros.
    """
    table = torch.arange(2**HALF_BITS).repeat(16, 1)
    counts = torch.arange(1, 2**HALF_BITS + 1)
    for zero in range(3, 16):
        products = counts * zero
        odd = products // (products & -products)
        exact = counts[odd < 2**HALF_BITS]
        above = torch.searchsorted(exact, counts[:-1])
        below = (above - 1).clamp_min(0)
        nearer = (exact[above] - counts[:-1]) <= (counts[:-1] - exact[below]).abs()
        table[zero, 1:] = exact[torch.where(nearer, above, below)]
    return table


def _span(weight: QuantizedWeight) -> tuple[int, int]:
    """Return the least and the greatest integer less its zero point."""
    grouped = weight.integers.view(*weight.zeros.shape, -1)  # (out, groups, group)
    zeros = weight.zeros.short()
    low = grouped.amin(-1).short() - zeros
    high = grouped.amax(-1).short() - zeros
    return int(low.min()), int(high.max())


def _nibbles(values: Tensor) -> Tensor:
    """Return 32 values below 16 as 16 bytes: the first half in the low bits, the second above."""
    low, high = values.to(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def _fifth_bits(values: Tensor) -> Tensor:
    """Return bit 4 of 32 values as 4 bytes, the first value lowest."""
    bits = ((values >> 4) & 1).to(torch.uint8).view(*values.shape[:-1], 4, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)
