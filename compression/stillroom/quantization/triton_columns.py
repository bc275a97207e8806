"""The loops of `columns` on a GPU: a warp takes some rows of the weight through a whole block.

A run of columns lies in its registers, a row of the weight a thread. Loops over columns are
unrolled, so that "the column whose turn it is" is a register and costs nothing to pick. For that
no width may be specialized: knowing that it is a multiple of 16, Triton would give a thread some
rows of some columns, to load more at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.quantization.columns import RUN

WIDTH = 32
"""Rows of the weight that a warp takes: one a thread."""
SIZES = ["block", "out", "version_stride", "column_stride"]


@triton.jit
def _nearest(position, lowest, highest):  # type: ignore[no-untyped-def]
    """Return the integer nearest to a position, ties to the even one, within integer bounds."""
    inside = tl.minimum(tl.maximum(position, lowest), highest)
    return (inside + 12582912.0) - 12582912.0  # 1.5 · 2^23: a float's last bit counts one there


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    weights,  # (versions, block, out), with strides
    V,  # (versions, block, block)
    scales,  # (block, out)
    zeros,  # (block, out)
    integers,  # (versions, block, out)
    errors,  # (versions, block, out)
    clipped,  # (versions, out) int64
    block,
    out,
    version_stride,
    column_stride,
    top: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = rows < out
    version = tl.program_id(1).to(tl.int64)
    weights += version * version_stride
    V += version * block * block
    integers += version * block * out
    errors += version * block * out
    place = tl.arange(0, RUN)
    beyond = tl.zeros((WIDTH,), tl.int32)
    for start in tl.range(0, block, RUN):
        column = start + place
        is_real = (column < block)[:, None] & exists[None, :]
        at = column[:, None] * column_stride + rows[None, :]
        w = tl.load(weights + at, mask=is_real, other=0.0)
        for k in tl.range(0, start):  # what earlier runs add to this one
            error = tl.load(errors + k * out + rows, mask=exists, other=0.0)
            share = tl.load(V + k * block + column, mask=column < block, other=0.0)
            w -= share[:, None] * error[None, :]
        for i in tl.static_range(RUN):
            at = start + i
            is_there = exists & (at < block)
            own = tl.sum(tl.where(place[:, None] == i, w, 0.0), axis=0)
            scale = tl.load(scales + at * out + rows, mask=is_there, other=1.0)
            zero = tl.load(zeros + at * out + rows, mask=is_there, other=0.0)
            position = tl.div_rn(own, scale)
            q = _nearest(position, -zero, top - zero)
            error = own - q * scale
            outside = tl.abs(position + zero - top / 2) > top / 2 + 0.5 + 1e-3
            beyond += (outside & is_there).to(tl.int32)
            tl.store(integers + at * out + rows, q + zero, mask=is_there)
            tl.store(errors + at * out + rows, error, mask=is_there)
            wanted = (column < block) & (place > i)
            share = tl.load(V + at * block + column, mask=wanted, other=0.0)
            w -= share[:, None] * error[None, :]
        tl.debug_barrier()  # the next run reads these errors
    tl.store(clipped + version * out + rows, beyond.to(tl.int64), mask=exists)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _descend(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    steps,  # (block, out)
    wish,  # (block, out)
    C,  # (block, block)
    lowest,  # (out,)
    highest,  # (out,)
    moved,  # (block, out)
    block,
    out,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = rows < out
    place = tl.arange(0, RUN)
    is_real = (place < block)[:, None] & exists[None, :]
    at = place[:, None] * out + rows[None, :]
    stands = tl.load(steps + at, mask=is_real, other=0.0)
    target = tl.load(wish + at, mask=is_real, other=0.0) + stands
    low = tl.load(lowest + rows, mask=exists, other=0.0)
    high = tl.load(highest + rows, mask=exists, other=0.0)
    for j in tl.static_range(RUN):
        is_own = place[:, None] == j
        q = _nearest(tl.sum(tl.where(is_own, target, 0.0), axis=0), low, high)
        down = tl.sum(tl.where(is_own, stands, 0.0), axis=0) - q
        tl.store(moved + j * out + rows, down, mask=exists & (j < block))
        share = tl.load(C + j * block + place, mask=(place < block) & (place > j), other=0.0)
        target += share[:, None] * down[None, :]


def launch_round(
    T: Tensor, V: Tensor, scales: Tensor, zeros: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers, errors and clipped weights, as `columns.round_columns` has them."""
    versions, block, out = T.shape
    T, V = (T if T.stride(2) == 1 else T.contiguous()), V.contiguous()
    integers, errors = (T.new_empty(versions, block, out) for _ in range(2))
    clipped = torch.empty(versions, out, dtype=torch.int64, device=T.device)
    with torch.cuda.device(T.device if T.is_cuda else -1):
        _round[(triton.cdiv(out, WIDTH), versions)](
            T, V, scales.contiguous(), zeros.contiguous(), integers, errors, clipped,
            block, out, T.stride(0), T.stride(1),
            top=top, RUN=RUN, WIDTH=WIDTH, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return integers, errors, clipped


def launch_descend(steps: Tensor, wish: Tensor, C: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Return by how many steps each column goes down, as `columns.descend_columns` has it."""
    block, out = steps.shape
    moved = steps.new_empty(block, out)
    lowest, highest = (bound.expand(out).contiguous() for bound in bounds)
    with torch.cuda.device(steps.device if steps.is_cuda else -1):
        _descend[(triton.cdiv(out, WIDTH),)](
            steps.contiguous(), wish.contiguous(), C.contiguous(), lowest, highest, moved,
            block, out, RUN=RUN, WIDTH=WIDTH, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return moved
