"""Go on where GPTQ ends: coordinate descent on the integers, and an exact refit of the scales.

GPTQ rounds each column once and never looks back. Both steps here lower the same objective,
tr((W - Q) H (W - Q)ᵀ), in which all columns count at once; neither can raise it.
"""

import torch
from torch import Tensor

from stillroom.quantization.grid import storable
from stillroom.quantization.weight import QuantizedWeight

# Rows whose scales are solved for at once: each needs a matrix of groups x groups.
MATRIX_NUMBERS_AT_ONCE = 1 << 24


def refine(
    W: Tensor, H: Tensor, weight: QuantizedWeight, rounds: int, block_size: int = 128
) -> QuantizedWeight:
    """Return `weight` improved as an approximation of W, (out, in), under H, (in, in).

    A round is one sweep of `descend` over all columns and one `refit_scales`. H must have a
    positive diagonal; damp it as for GPTQ.
    """
    for _ in range(rounds):
        weight = descend(W, H, weight, block_size)
        weight = refit_scales(W, H, weight)
    return descend(W, H, weight, block_size) if rounds else weight


def descend(
    W: Tensor, H: Tensor, weight: QuantizedWeight, block_size: int = 128
) -> QuantizedWeight:
    """Return the weight after one sweep of coordinate descent, all rows at once.

    Each column moves to the point of its grid that is best while all others stay:

        w'_j = q_j + [H (W - Q)ᵀ]_j / H_jj,   q_j = round(w'_j)

    The residual H (W - Q)ᵀ is kept up to date inside a block at once, outside when it is done.
    """
    columns = W.shape[1]
    group = weight.group_size
    scales = weight.scales.float().T.contiguous()  # (groups, out)
    zeros = weight.zeros.float().T.contiguous()
    integers = weight.integers.T.float().contiguous()  # (in, out)
    values = weight.dequantize().T.contiguous()  # (in, out)
    R = H @ (W.T - values)  # (in, out)
    diagonal = H.diagonal().tolist()
    top = 2**weight.bits - 1
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        moved = torch.empty(end - start, W.shape[0], device=W.device)
        for j in range(start, end):
            scale, zero = scales[j // group], zeros[j // group]  # (out,)
            target = torch.add(values[j], R[j], alpha=1 / diagonal[j])
            q = target.div_(scale).round_().add_(zero).clamp_(0, top)
            integers[j] = q
            delta = torch.sub(values[j], q.sub_(zero).mul_(scale), out=moved[j - start])
            R[start:end].addr_(H[start:end, j], delta)
        R[:start].addmm_(H[:start, start:end], moved)
        R[end:].addmm_(H[end:, start:end], moved)
    return QuantizedWeight(
        integers.T.to(torch.uint8).contiguous(), weight.scales, weight.zeros, weight.bits
    )


def refit_scales(W: Tensor, H: Tensor, weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight with the scales that are best for its integers, row by row.

    With Z the integers less their zero points, one column a group: s = (Zᵀ H Z)⁻¹ Zᵀ H w. Rows in
    which the stored fp16 scales would lose more than the old ones keep those.
    """
    groups = weight.scales.shape[1]
    rows = max(1, MATRIX_NUMBERS_AT_ONCE // (groups * groups + W.shape[1]))
    scales = torch.cat(
        [
            _solve_scales(W[start : start + rows], H, part)
            for start, part in ((s, weight.rows(s, s + rows)) for s in range(0, len(W), rows))
        ]
    )
    fitted = QuantizedWeight(weight.integers, scales, weight.zeros, weight.bits)
    better = row_losses(W, H, fitted) < row_losses(W, H, weight)  # (out,)
    kept = torch.where(better[:, None], scales, weight.scales)
    return QuantizedWeight(weight.integers, kept, weight.zeros, weight.bits)


def row_losses(W: Tensor, H: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return (w - q) H (w - q)ᵀ of each row, (out,)."""
    D = W - weight.dequantize()
    return ((D @ H) * D).sum(1)


def _solve_scales(W: Tensor, H: Tensor, weight: QuantizedWeight) -> Tensor:
    out, columns = W.shape
    group = weight.group_size
    groups = columns // group
    zeros = weight.zeros.float().repeat_interleave(group, dim=1)
    Z = weight.integers.float() - zeros  # (out, in)
    A = torch.empty(out, groups, groups, device=W.device)  # Zᵀ H Z
    b = torch.empty(out, groups, device=W.device)  # Zᵀ H w
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        ZH = Z[:, part] @ H[part]  # (out, in)
        A[:, g] = (ZH * Z).view(out, groups, group).sum(-1)
        b[:, g] = (ZH * W).sum(-1)
    # A group whose integers are all zero points has no scale of its own: the old one stays.
    free = A.diagonal(dim1=1, dim2=2) > 0
    A.diagonal(dim1=1, dim2=2).add_((~free).float())
    solved, failed = torch.linalg.solve_ex(A.double(), b.double()[..., None])
    found = solved[..., 0].float()
    usable = free & torch.isfinite(found) & (found != 0) & (failed == 0)[:, None]
    return torch.where(usable, storable(found), weight.scales.float()).half()
