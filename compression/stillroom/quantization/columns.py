"""Round the columns of a block one after the other: the part of the work that cannot be a product.

Every column waits for those before it, and each step is small: on a GPU one program does all steps
of some rows, instead of a few launches a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.quantization.grid import beyond
from stillroom.quantization.threads import one_thread

# Columns that are corrected one by one.
RUN = 32


@dataclass(frozen=True)
class RoundedBlock:
    """What GPTQ makes of a block of columns."""

    integers: Tensor  # (versions, block, out) float32, from 0
    errors: Tensor  # (versions, block, out), the weight less its rounding
    clipped: Tensor  # (versions, out): weights beyond their grid when they were rounded


def round_columns(T: Tensor, V: Tensor, scales: Tensor, zeros: Tensor, top: int) -> RoundedBlock:
    """Round the columns T, (versions, block, out), that all columns before them have corrected.

    A column is corrected for those before it in its run of `RUN` when it is reached; the columns
    after a run are corrected when it is done. So most of the work is a product of matrices.

    Args:
        T: changed on the way.
        V: (versions, block, block), U_ij / U_ii.
        scales, zeros: (block, out), each column's grid.
        top: the largest integer.
    """
    if _has_triton(T):
        from stillroom.quantization.triton_columns import launch_round

        return RoundedBlock(*launch_round(T, V, scales, zeros, top))
    columns = T.shape[1]
    lowest, highest = -zeros, top - zeros
    E = torch.empty_like(T)
    positions, Q = torch.empty_like(E), torch.empty_like(E)
    with one_thread():
        for start in range(0, columns, RUN):
            end = min(start + RUN, columns)
            for i in range(start, end):
                w = T[:, i]  # (versions, out)
                if i > start:
                    before = V[:, None, start:i, i]
                    w = torch.baddbmm(w[:, None], before, E[:, start:i], alpha=-1)[:, 0]
                q = torch.round(torch.div(w, scales[i], out=positions[:, i]), out=Q[:, i])
                torch.clamp(q, lowest[i], highest[i], out=q)
                torch.addcmul(w, q, scales[i], value=-1, out=E[:, i])
            T[:, end:].baddbmm_(V[:, start:end, end:].mT, E[:, start:end], alpha=-1)
        return RoundedBlock(Q.add_(zeros), E, beyond(positions.add_(zeros), top).sum(1))


def descend_columns(
    steps: Tensor, wish: Tensor, C: Tensor, bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """Return by how many steps each column goes down, (block, out), one column after the other.

    Args:
        steps: (block, out), where the columns stand, in steps of the grid from zero.
        wish: (block, out), by how many steps each would go up, if it were the only one to move.
            Changed on the way.
        C: (block, block), H_ij / H_jj.
        bounds: the lowest and the highest step, (out,) each.
    """
    if _has_triton(steps) and len(steps) <= RUN:
        from stillroom.quantization.triton_columns import launch_descend

        return launch_descend(steps, wish, C, bounds)
    wish += steps
    moved = torch.empty_like(steps)
    with one_thread():
        for j in range(len(steps)):
            target = wish[j]
            if j:
                torch.addmv(target, moved[:j].T, C[:j, j], out=target)
            torch.clamp(target.round_(), *bounds, out=target)
            torch.sub(steps[j], target, out=moved[j])
    return moved


def _has_triton(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    try:
        from stillroom.quantization.kernels.triton_kernel import cannot_compile
    except ImportError:
        return False
    return cannot_compile() is None
