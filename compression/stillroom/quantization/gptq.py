"""GPTQ (Frantar et al. 2022, 2210.17323), with act-order on static groups."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.quantization.columns import round_columns
from stillroom.quantization.grid import WEIGHTS_AT_ONCE_ON_GPU, Grid, find_grid
from stillroom.quantization.hessian import inverse_cholesky
from stillroom.quantization.options import DEFAULT_DAMPING, QuantizationOptions
from stillroom.quantization.weight import QuantizedWeight, Solution, relative_output_error


def gptq(W: Tensor, H: Tensor, options: QuantizationOptions) -> Solution:
    """Return W, (out, in), quantized for inputs whose mean of 2 x xᵀ is H, (in, in).

    The rounding is `solve`, damped by `options.damping`. With `act_order` the grids are found
    beforehand on the original weights, so that groups stay runs of neighbouring columns; in
    natural order a group's grid is found when its first column is reached, on corrected weights.

    Raises:
        NotFiniteError: H holds a NaN or an infinity.
        NotPositiveDefiniteError: H cannot be inverted with any damping that was tried.
    """
    W = W.float()
    grids = find_grids(W, H, options) if options.act_order else None
    order = column_order(H, options)
    damping = DEFAULT_DAMPING if options.damping is None else options.damping
    factor = inverse_cholesky(H[order][:, order], damping)
    rounded = solve(W[None], factor.upper[None].to(W.device), order, grids, options, H.diagonal())
    weight = rounded.weight(0)
    error = relative_output_error(W, weight, H.float())
    return Solution(weight, error, factor.damping, int(rounded.clipped[0].sum()))


def column_order(H: Tensor, options: QuantizationOptions) -> Tensor:
    """Return the order, (in,), in which columns are rounded: the largest inputs first, if asked."""
    if options.act_order:
        return torch.argsort(H.diagonal(), descending=True, stable=True)
    return torch.arange(H.shape[0], device=H.device)


def find_grids(W: Tensor, H: Tensor, options: QuantizationOptions) -> Grid:
    """Return the grids of all groups of W, (out, in), as tensors (out, groups)."""
    importance = H.diagonal().float() if options.weighted_grid else None
    group = options.group_columns(W.shape[1])
    if W.is_cuda:
        return find_grids_at_once(W, group, importance, options)
    found = [
        _grid_of_group(W[:, start : start + group], start, importance, options)
        for start in range(0, W.shape[1], group)
    ]
    return Grid(
        torch.cat([grid.scale for grid in found], dim=1),
        torch.cat([grid.zero for grid in found], dim=1),
        options.bits,
        options.symmetric,
    )


def find_grids_at_once(
    W: Tensor, group: int, importance: Tensor | None, options: QuantizationOptions
) -> Grid:
    """Return the grids of all groups, (out, groups), searched together: a GPU waits for no loop."""
    groups = W.shape[1] // group
    rows = max(1, WEIGHTS_AT_ONCE_ON_GPU // W.shape[1])
    found = []
    for part in torch.split(W, rows):
        own = None if importance is None else importance.view(groups, group).repeat(len(part), 1)
        values = part.reshape(-1, group)  # (rows * groups, group)
        grid = find_grid(values, options.bits, options.symmetric, own)
        found.append((grid.scale.view(-1, groups), grid.zero.view(-1, groups)))
    scales, zeros = (torch.cat(each) for each in zip(*found, strict=True))
    return Grid(scales, zeros, options.bits, options.symmetric)


@dataclass(frozen=True)
class Rounded:
    """Integers of several versions of a layer, on the grids they share."""

    integers: Tensor  # (versions, in, out) uint8, columns in their places
    grids: Grid  # tensors (out, groups)
    clipped: Tensor  # (versions, out) int64: weights beyond their grid when they were rounded

    def weight(self, version: int) -> QuantizedWeight:
        """Return the weight of one version."""
        return QuantizedWeight(
            integers=self.integers[version].T.contiguous(),
            scales=self.grids.scale.half(),
            zeros=self.grids.zero.to(torch.uint8),
            bits=self.grids.bits,
        )


def solve(
    W: Tensor,
    U: Tensor,
    order: Tensor,
    grids: Grid | None,
    options: QuantizationOptions,
    diagonal: Tensor,
) -> Rounded:
    """Round W, (versions, out, in), column after column, all rows at once.

    What the rounding of column i adds to the output is made good in the columns after it
    (algorithm 1 of the paper), with H⁻¹ = Uᵀ U in the given order of columns:

        E_i = W_i - quant(W_i),   W_j -= E_i U_ij / U_ii for j > i

    Columns up to `block_size` ahead are corrected at once, the others when the block is done.
    Versions are other targets or other dampings of the same layer, solved side by side.

    Args:
        W: (versions or 1, out, in) float32.
        U: (versions or 1, in, in) float32, upper triangular, rows and columns in `order`.
        order: (in,), the columns in the order in which they are rounded.
        grids: tensors (out, groups); None finds each group's when its first column is reached,
            which takes one version and the natural order.
        options: bits, groups and the width of a block.
        diagonal: (in,), the Hessian's diagonal, for grids that are found on the way.
    """
    versions, out, columns = max(len(W), len(U)), W.shape[1], W.shape[2]
    group = options.group_columns(columns)
    importance = diagonal.float() if options.weighted_grid else None
    place = order.tolist()
    # Transposed: a column of W lies in one piece of memory, as it is read and corrected.
    T = W.transpose(1, 2)[:, order].expand(versions, columns, out).contiguous()  # (v, in, out)
    U = U.expand(versions, columns, columns)
    Q = torch.empty(versions, columns, out, dtype=torch.uint8, device=W.device)
    clipped = torch.zeros(versions, out, dtype=torch.int64, device=W.device)
    scales, zeros = _rows_of(grids)
    start = 0
    while start < columns:
        end = min(start + options.block_size, columns)
        if grids is None:
            # No block crosses into a group whose grid must wait for the corrections.
            end = min(end, (start // group + 1) * group)
            if start % group == 0:
                found = _grid_of_group(T[0, start : start + group].T, start, importance, options)
                scales.append(found.scale[:, 0])
                zeros.append(found.zero[:, 0])
        index = [place[i] // group for i in range(start, end)]
        # Each row over its diagonal, (versions, block, columns from the block on).
        V = U[:, start:end, start:] / U[:, start:end, start:].diagonal(dim1=1, dim2=2)[..., None]
        block = round_columns(
            T[:, start:end],
            V[..., : end - start],
            torch.stack([scales[g] for g in index]),
            torch.stack([zeros[g] for g in index]),
            2**options.bits - 1,
        )
        Q[:, start:end] = block.integers
        clipped += block.clipped
        T[:, end:].baddbmm_(V[..., end - start :].mT, block.errors, alpha=-1)
        start = end
    integers = torch.empty_like(Q)
    integers[:, order] = Q
    shared = Grid(torch.stack(scales, 1), torch.stack(zeros, 1), options.bits, options.symmetric)
    return Rounded(integers, shared, clipped)


def _grid_of_group(
    W: Tensor, start: int, importance: Tensor | None, options: QuantizationOptions
) -> Grid:
    """Return the grid of the columns W, (out, group), the first of which is column `start`."""
    weights = None if importance is None else importance[start : start + W.shape[1]]
    return find_grid(W, options.bits, options.symmetric, weights)


def _rows_of(grids: Grid | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return scales and zero points by group, (out,) each."""
    if grids is None:
        return [], []
    return list(grids.scale.T.contiguous()), list(grids.zero.T.contiguous())
