"""A linear layer's weight as integers, and what making it cost."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in) as integers from 0 to 2^bits - 1 on one grid per row and group."""

    integers: Tensor  # (out, in) uint8
    scales: Tensor  # (out, groups) float16
    zeros: Tensor  # (out, groups) uint8
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return scale * (integer - zero), (out, in), computed in float32."""
        out, columns = self.integers.shape
        grouped = self.integers.view(out, -1, self.group_size).float()  # (out, groups, group)
        values = (grouped - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return values.view(out, columns).to(dtype)

    def rows(self, start: int, end: int) -> "QuantizedWeight":
        """Return the rows from `start` up to `end`."""
        rows = slice(start, end)
        return QuantizedWeight(self.integers[rows], self.scales[rows], self.zeros[rows], self.bits)


@dataclass(frozen=True)
class LayerAccount:
    """What quantizing one layer cost, for the report and the gates.

    Errors are shares of the output's energy, tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ).
    """

    name: str
    method: Literal["gptq", "obq", "rtn"]  # what was done
    fell_back: bool  # it is not what was asked for
    relative_error: float  # on the calibration rows
    damping: float  # share of the mean of the Hessian's diagonal; 0 for rounding
    clipped: int  # weights beyond their grid
    weights: int
    dead_inputs: int  # inputs that were always zero
    bits: int = 4
    group_size: int = -1
    held_out_error: float | None = None  # on rows that the solution was not made from
    # No unclipped rounding by GPTQ can have a larger error; none where `alpha` asked for more.
    babai_bound: float | None = None
    alpha: float = 0.0  # share of the earlier layers' loss that it was asked to make good
    refined: bool = False  # coordinate descent lowered the held-out error and was kept


@dataclass(frozen=True)
class Solution:
    """A quantized weight and its accounting."""

    weight: QuantizedWeight
    relative_error: float  # tr(Δ H Δᵀ) / tr(W H Wᵀ): the share of the output's energy that is lost
    damping: float  # used; larger than asked for where the Hessian needed it; 0 for rounding
    clipped: int  # weights beyond their grid by more than half a step when they were rounded
    bias: Tensor | None = None  # (out,), the corrected bias; None: it stays
    held_out_error: float | None = None
    babai_bound: float | None = None
    alpha: float = 0.0
    refined: bool = False


def relative_output_error(W: Tensor, quantized: QuantizedWeight, H: Tensor) -> float:
    """Return tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ), for W (out, in) and H (in, in).

    Without a cross term this is the squared error of the layer's output over its energy on the
    inputs of which H is the mean of 2 x xᵀ. Where the output is always zero, 0.
    """
    delta = W - quantized.dequantize()
    energy = float(((W @ H) * W).sum(dtype=torch.float64))
    lost = float(((delta @ H) * delta).sum(dtype=torch.float64))
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def warn_of_fallbacks(accounts: Sequence[LayerAccount]) -> None:
    """Say how many layers were rounded to nearest although more was asked for."""
    names = [account.name for account in accounts if account.fell_back]
    if names:
        logger.warning(
            "%d of %d layers were rounded to nearest instead of what was asked for, first %s: the "
            "calibration rows do not reach them, or their Hessian cannot be inverted",
            len(names),
            len(accounts),
            names[0],
        )
