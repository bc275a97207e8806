"""Go on where GPTQ ends: coordinate descent on the integers, and an exact refit of the scales.

GPTQ rounds each column once and never looks back. Both steps here lower the same objective,
tr((W - Q) H (W - Q)ᵀ), in which all columns count at once; neither can raise it.
"""

import torch
from torch import Tensor

from stillroom.quantization.columns import descend_columns
from stillroom.quantization.grid import storable
from stillroom.quantization.weight import QuantizedWeight

# Rows whose scales are solved for at once: each needs a matrix of groups x groups.
MATRIX_NUMBERS_AT_ONCE = 1 << 24
MATRIX_NUMBERS_AT_ONCE_ON_GPU = 1 << 28


def refine(
    W: Tensor, H: Tensor, weight: QuantizedWeight, rounds: int, block_size: int = 32
) -> QuantizedWeight:
    """Return `weight` improved as an approximation of W, (out, in), under H, (in, in).

    A round is one sweep of `descend` over all columns and one `refit_scales`. H must have a
    positive diagonal; damp it as for GPTQ.
    """
    WH = W @ H
    for _ in range(rounds):
        weight = descend(W, H, weight, block_size)
        weight = refit_scales(W, H, weight, WH)
    return descend(W, H, weight, block_size) if rounds else weight


def descend(W: Tensor, H: Tensor, weight: QuantizedWeight, block_size: int = 32) -> QuantizedWeight:
    """Return the weight after one sweep of coordinate descent, all rows at once.

    Each column moves to the point of its grid that is best while all others stay:

        w'_j = q_j + [H (W - Q)ᵀ]_j / H_jj,   q_j = round(w'_j)

    The residual H (W - Q)ᵀ is brought up to date for a column when it is reached, for those after
    a block when it is done. A block ends where its group does.
    """
    columns = W.shape[1]
    group = weight.group_size
    scales = weight.scales.float().T.contiguous()  # (groups, out)
    zeros = weight.zeros.float().T.contiguous()
    integers = weight.integers.T.float().contiguous()  # (in, out)
    R = H @ (W - weight.dequantize()).T  # (in, out)
    diagonal = H.diagonal()
    top = 2**weight.bits - 1
    start = 0
    while start < columns:
        g = start // group
        end = min(start + block_size, (g + 1) * group)
        scale, zero = scales[g], zeros[g]  # (out,)
        moved = descend_columns(
            integers[start:end] - zero,
            R[start:end] / diagonal[start:end, None] / scale,
            H[start:end, start:end] / diagonal[start:end],
            (-zero, top - zero),
        )
        integers[start:end] -= moved
        R[end:].addmm_(H[end:, start:end], moved.mul_(scale))
        start = end
    return QuantizedWeight(
        integers.T.to(torch.uint8).contiguous(), weight.scales, weight.zeros, weight.bits
    )


def refit_scales(
    W: Tensor, H: Tensor, weight: QuantizedWeight, WH: Tensor | None = None
) -> QuantizedWeight:
    """Return the weight with the scales that are best for its integers, row by row.

    With Z the integers less their zero points, one column a group: s = (Zᵀ H Z)⁻¹ Zᵀ H w. Rows in
    which the stored fp16 scales would lose more than the old ones keep those. WH is W @ H,
    (out, in), where it is known.
    """
    WH = W @ H if WH is None else WH
    groups = weight.scales.shape[1]
    at_once = MATRIX_NUMBERS_AT_ONCE_ON_GPU if W.is_cuda else MATRIX_NUMBERS_AT_ONCE
    rows = max(1, at_once // (groups * groups + W.shape[1]))
    scales = torch.cat(
        [
            _solve_scales(WH[start : start + rows], H, weight.rows(start, start + rows))
            for start in range(0, len(W), rows)
        ]
    )
    return QuantizedWeight(weight.integers, scales, weight.zeros, weight.bits)


def row_losses(W: Tensor, H: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return (w - q) H (w - q)ᵀ of each row, (out,)."""
    D = W - weight.dequantize()
    return ((D @ H) * D).sum(1)


def _solve_scales(WH: Tensor, H: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return the scales of some rows, (rows, groups) fp16."""
    A, b = _normal_equations(WH, H, weight)
    # A group whose integers are all zero points has no scale of its own: the old one stays.
    free = A.diagonal(dim1=1, dim2=2) > 0
    A.diagonal(dim1=1, dim2=2).add_((~free).float())
    # Positive definite as H is. LU would take a GPU a launch for each row.
    factor, failed = torch.linalg.cholesky_ex(A.double())
    found = torch.cholesky_solve(b.double()[..., None], factor)[..., 0].float()
    usable = free & torch.isfinite(found) & (found != 0) & (failed == 0)[:, None]
    old = weight.scales.float()
    new = torch.where(usable, storable(found), old)

    def loss(s: Tensor) -> Tensor:
        """Return sᵀ A s - 2 bᵀ s, (rows,): the loss but for what does not depend on s."""
        return (((A @ s[..., None])[..., 0] - 2 * b) * s).double().sum(1)

    return torch.where((loss(new) < loss(old))[:, None], new, old).half()


def _normal_equations(WH: Tensor, H: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return Zᵀ H Z, (rows, groups, groups), and Zᵀ H w, (rows, groups), of some rows."""
    rows, columns = WH.shape
    group = weight.group_size
    groups = columns // group
    Z = weight.integers.float() - weight.zeros.float().repeat_interleave(group, dim=1)
    A = torch.empty(rows, groups, groups, device=WH.device)
    for g in range(groups):
        part, rest = slice(g * group, (g + 1) * group), slice(g * group, columns)
        ZH = (Z[:, part] @ H[part, rest]).mul_(Z[:, rest])  # (rows, columns from this group on)
        A[:, g, g:] = ZH.view(rows, groups - g, group).sum(-1)
        A[:, g:, g] = A[:, g, g:]
    return A, (WH * Z).view(rows, groups, group).sum(-1)
