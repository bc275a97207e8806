"""GPTQ (Frantar et al. 2022, 2210.17323), with act-order on static groups."""

import torch
from torch import Tensor

from stillroom.quantization.grid import Grid, find_grid
from stillroom.quantization.hessian import inverse_cholesky
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.weight import QuantizedWeight, Solution, relative_output_error


def gptq(W: Tensor, H: Tensor, options: QuantizationOptions) -> Solution:
    """Return W, (out, in), quantized for inputs whose mean of 2 x xᵀ is H, (in, in).

    Columns are rounded one after another, all rows at once; what the rounding of column i adds to
    the output is made good in the columns after it (algorithm 1 of the paper):

        E_i = (W_i - quant(W_i)) / U_ii,   W_j -= E_i U_ij for j > i,   H⁻¹ = Uᵀ U

    Columns up to `block_size` ahead are corrected at once, the others when the block is done.
    In natural order a group's grid is found when its first column is reached, on corrected
    weights. With `act_order` the columns with the largest inputs come first, and the grids are
    found beforehand on the original weights, so that groups stay runs of neighbouring columns.

    Raises:
        NotFiniteError: H holds a NaN or an infinity.
        NotPositiveDefiniteError: H cannot be inverted with any damping that was tried.
    """
    W = W.float()
    out, columns = W.shape
    group = options.group_columns(columns)
    importance = H.diagonal().float() if options.weighted_grid else None
    order = torch.arange(columns, device=W.device)
    grids: dict[int, Grid] = {}
    if options.act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
        for g in range(columns // group):
            grids[g] = _grid_of_group(W, g, group, options, importance)
    place = order.tolist()
    factor = inverse_cholesky(H[order][:, order], options.damping)
    U = factor.upper.to(W.device)

    # Transposed: a column of W lies in one piece of memory, as it is read and corrected.
    T = W.T[order].contiguous()  # (in, out)
    Q = torch.empty(columns, out, dtype=torch.uint8, device=W.device)
    clipped = torch.zeros((), dtype=torch.int64, device=W.device)
    start = 0
    while start < columns:
        end = min(start + options.block_size, columns)
        if not options.act_order:
            # No block crosses into a group whose grid must wait for the corrections.
            end = min(end, (start // group + 1) * group)
            if start % group == 0:
                g = start // group
                grids[g] = _grid_of_group(T.T, g, group, options, importance)
        E = torch.empty(end - start, out, device=W.device)
        for i in range(start, end):
            grid = grids[place[i] // group]
            w = T[i, :, None]  # (out, 1)
            q = grid.quantize(w)
            clipped += grid.clipped(w).sum()
            E[i - start] = ((w - grid.dequantize(q)) / U[i, i])[:, 0]
            T[i + 1 : end].addr_(U[i, i + 1 : end], E[i - start], alpha=-1)
            Q[i] = q[:, 0].to(torch.uint8)
        T[end:].addmm_(U[start:end, end:].T, E, alpha=-1)
        start = end

    integers = torch.empty_like(Q)
    integers[order] = Q
    weight = _assemble(integers, grids, options.bits)
    error = relative_output_error(W, weight, H.float())
    return Solution(weight, error, factor.damping, int(clipped))


def _grid_of_group(
    W: Tensor, g: int, group: int, options: QuantizationOptions, importance: Tensor | None
) -> Grid:
    columns = slice(g * group, (g + 1) * group)
    weights = None if importance is None else importance[columns]
    return find_grid(W[:, columns], options.bits, options.symmetric, weights)


def _assemble(integers: Tensor, grids: dict[int, Grid], bits: int) -> QuantizedWeight:
    ordered = [grids[g] for g in range(len(grids))]
    return QuantizedWeight(
        integers=integers.T.contiguous(),
        scales=torch.cat([grid.scale for grid in ordered], dim=1).half(),
        zeros=torch.cat([grid.zero for grid in ordered], dim=1).to(torch.uint8),
        bits=bits,
    )
