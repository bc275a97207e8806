"""Grids of integers: a scale and a zero point for each row of a group of weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A candidate range is this share of the largest weight: from all of it down to 40 %.
SHRINK_STEPS = 40
SMALLEST_SHRINK = 0.4
# Rows are searched in pieces of so many weights, which stay in the processor's cache.
WEIGHTS_AT_ONCE = 1 << 16
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number
LARGEST_SCALE = 65504.0  # the largest


@dataclass(frozen=True)
class Grid:
    """The values scale * (integer - zero), for integers from 0 to 2^bits - 1.

    Scales are float32 tensors that hold fp16 numbers: what is stored is what was measured.
    Zero points are whole numbers from 1 to 2^bits - 1, because the GPTQ checkpoint format stores
    the zero point minus one in `bits` bits; of a symmetric grid they are 2^(bits - 1).
    """

    scale: Tensor  # (rows, 1)
    zero: Tensor  # (rows, 1)
    bits: int
    symmetric: bool

    def quantize(self, values: Tensor) -> Tensor:
        """Return the nearest integers, (rows, columns), in the dtype of `values`."""
        return torch.round(values / self.scale).add_(self.zero).clamp_(0, 2**self.bits - 1)

    def dequantize(self, integers: Tensor) -> Tensor:
        """Return the values of the integers, (rows, columns)."""
        return (integers - self.zero) * self.scale

    def clipped(self, values: Tensor) -> Tensor:
        """Return where a value lies beyond the grid by more than half a step, (rows, columns)."""
        position = values / self.scale + self.zero
        middle = (2**self.bits - 1) / 2
        beyond: Tensor = (position - middle).abs() > middle + 0.5 + 1e-3
        return beyond


def find_grid(values: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """Return the grid for each row of `values`, (rows, columns) in float32.

    Without `importance` the grid spans the smallest and the largest value. With it, (columns,),
    the range is shrunk to the share that minimises sum_j importance_j (w_j - q_j)^2; with the
    diagonal of the Hessian this is the layer's output error but for its cross terms.
    """
    whole = _full_range(values, bits, symmetric)
    if importance is None or not bool((importance > 0).any()):
        return whole
    rows = max(1, WEIGHTS_AT_ONCE // values.shape[1])
    parts = [
        _search(piece.contiguous(), importance, scale, zero, bits)
        for piece, scale, zero in zip(
            *(torch.split(each, rows) for each in (values, whole.scale, whole.zero)), strict=True
        )
    ]
    return Grid(torch.cat(parts), whole.zero, bits, symmetric)


def _full_range(values: Tensor, bits: int, symmetric: bool) -> Grid:
    top = 2**bits - 1
    low = values.amin(dim=1, keepdim=True).clamp(max=0)  # (rows, 1)
    high = values.amax(dim=1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = 2 * torch.maximum(high, -low) / top
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = torch.round(-low / scale.clamp(min=SMALLEST_SCALE))
        # Without negative values the grid still starts one step below zero: see Grid.
        scale = torch.where(zero < 1, high / (top - 1), scale)
        zero = zero.clamp(1, top)
    empty = (low == 0) & (high == 0)
    scale = torch.where(empty, 1.0, scale)
    zero = torch.where(empty, float(2 ** (bits - 1)), zero)
    return Grid(_storable(scale), zero, bits, symmetric)


def _storable(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().to(scale.dtype)


def _search(values: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the scales, (rows, 1), whose weighted squared error is smallest."""
    best = torch.full_like(scale, torch.inf)
    found = scale
    for step in range(SHRINK_STEPS + 1):
        share = 1 - (1 - SMALLEST_SHRINK) * step / SHRINK_STEPS
        candidate = _storable(scale * share)
        error = values / candidate
        error.round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(candidate).sub_(values)
        loss = (error.square_() @ importance)[:, None]  # (rows, 1)
        better = loss < best
        best = torch.where(better, loss, best)
        found = torch.where(better, candidate, found)
    return found
