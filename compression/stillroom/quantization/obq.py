"""Optimal Brain Quantization (Frantar & Alistarh 2022, 2208.11580), for small layers."""

import torch
from torch import Tensor

from stillroom.errors import RecipeError
from stillroom.quantization.gptq import find_grids
from stillroom.quantization.grid import Grid
from stillroom.quantization.hessian import inverse_cholesky
from stillroom.quantization.options import DEFAULT_DAMPING, QuantizationOptions
from stillroom.quantization.weight import QuantizedWeight, Solution, relative_output_error

# Each row updates an inverse of its own after each of its weights: out x in^3 multiplications.
LARGEST_WORK = 2**36
# Inverses of so many bytes are worked on together: enough to hide the calls, and in the cache.
BYTES_AT_ONCE = 2**23


def obq(
    W: Tensor, H: Tensor, options: QuantizationOptions, order: Tensor | None = None
) -> Solution:
    """Return W, (out, in), quantized for inputs whose mean of 2 x xᵀ is H, (in, in).

    Each row on its own rounds the weight p that costs least, makes good in the weights that are
    left what that adds to the output, and removes p from its inverse Hessian (section 5):

        p = argmin (quant(w_p) - w_p)² / [H⁻¹]_pp,   w -= (w_p - quant(w_p)) / [H⁻¹]_pp H⁻¹_:p,
        H⁻¹ -= H⁻¹_:p H⁻¹_p: / [H⁻¹]_pp

    A weight that the corrections pushed off its grid is rounded at once, the farthest first: later
    there would be fewer weights to make good its error. `order`, (in,), makes all rows round their
    columns in that order instead, which is GPTQ on static groups. The grids are found beforehand
    on the original weights; `act_order` and `block_size` have no meaning here.

    Raises:
        RecipeError: the layer is too large: the work grows with out x in³.
        NotFiniteError: H holds a NaN or an infinity.
        NotPositiveDefiniteError: H cannot be inverted with any damping that was tried.
    """
    W = W.float()
    out, columns = W.shape
    refuse_large(out, columns)
    factor = inverse_cholesky(H, DEFAULT_DAMPING if options.damping is None else options.damping)
    U = factor.upper.double().to(W.device)
    inverse = U.T @ U
    grids = find_grids(W, H, options)  # (out, groups)
    group = options.group_columns(columns)
    integers = torch.empty(out, columns, dtype=torch.uint8, device=W.device)
    clipped = 0
    step = max(1, BYTES_AT_ONCE // (8 * columns**2))
    for rows in torch.split(torch.arange(out, device=W.device), step):
        grid = Grid(
            grids.scale[rows].repeat_interleave(group, dim=1),  # (rows, in)
            grids.zero[rows].repeat_interleave(group, dim=1),
            options.bits,
            options.symmetric,
        )
        integers[rows], beyond = _round_rows(W[rows], inverse, grid, order)
        clipped += beyond
    weight = QuantizedWeight(integers, grids.scale.half(), grids.zero.to(torch.uint8), options.bits)
    return Solution(weight, relative_output_error(W, weight, H.float()), factor.damping, clipped)


def refuse_large(out: int, columns: int) -> None:
    """Refuse a layer for which OBQ would take too long.

    Raises:
        RecipeError: out x in_features³ is above the limit.
    """
    if out * columns**3 > LARGEST_WORK:
        raise RecipeError(
            f"OBQ takes layers of out_features x in_features³ up to {LARGEST_WORK:.1e}: "
            f"{out} x {columns}³ is {out * columns**3:.1e}; use gptq"
        )


def _round_rows(W: Tensor, inverse: Tensor, grid: Grid, order: Tensor | None) -> tuple[Tensor, int]:
    """Return the integers of W, (rows, in), and how many weights were beyond their grid.

    `inverse` is H⁻¹, (in, in) float64; the scales and zero points of the grid are (rows, in).
    """
    W = W.double()
    rows, columns = W.shape
    inverses = inverse.repeat(rows, 1, 1)  # (rows, in, in)
    left = torch.ones_like(W, dtype=torch.bool)
    integers = torch.empty_like(W, dtype=torch.uint8)
    clipped = torch.zeros((), dtype=torch.int64, device=W.device)
    every = torch.arange(rows, device=W.device)
    for i in range(columns):
        Q = grid.quantize(W.float())
        error = W - grid.dequantize(Q)
        beyond = grid.clipped(W.float()) & left
        if order is None:
            p = _cheapest(error, inverses.diagonal(dim1=1, dim2=2), beyond, left)
        else:
            p = order[i].to(W.device).expand(rows)
        integers[every, p] = Q[every, p].to(torch.uint8)
        clipped += beyond[every, p].sum()
        column = inverses[every, p]  # (rows, in)
        scaled = column / column[every, p, None]
        W -= error[every, p, None] * scaled
        inverses.baddbmm_(column[:, :, None], scaled[:, None], alpha=-1)
        # What should be zero is made so: rounding errors must not reach weights that are done.
        inverses[every, p] = 0
        inverses[every, :, p] = 0
        left[every, p] = False
    return integers, int(clipped)


def _cheapest(error: Tensor, diagonal: Tensor, beyond: Tensor, left: Tensor) -> Tensor:
    """Return for each row the column to round next, (rows,); all arguments are (rows, in)."""
    cost = torch.where(left, error.square() / diagonal, torch.inf)
    farthest = torch.where(beyond, error.abs(), -1.0).argmax(dim=1)
    return torch.where(beyond.any(dim=1), farthest, cost.argmin(dim=1))
