"""Grids of integers: a scale and a zero point for each row of a group of weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.quantization.threads import one_thread

# A candidate range is one of these shares of the range that the weights span.
SHARES = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44)
# Rounds of refitting scale and zero point to the integers that they led to.
REFITS = 3
# Rows are searched in pieces of so many weights: on a CPU those that stay in its cache.
WEIGHTS_AT_ONCE = 1 << 16
WEIGHTS_AT_ONCE_ON_GPU = 1 << 25
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number
LARGEST_SCALE = 65504.0  # the largest


@dataclass(frozen=True)
class Grid:
    """The values scale * (integer - zero), for integers from 0 to 2^bits - 1.

    Scales are float32 tensors that hold fp16 numbers: what is stored is what was measured.
    They are negative where a symmetric grid is turned.
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
        return beyond(values / self.scale + self.zero, 2**self.bits - 1)


def beyond(positions: Tensor, top: int) -> Tensor:
    """Return where a position on a grid from 0 to `top` is outside by more than half a step."""
    outside: Tensor = (positions - top / 2).abs() > top / 2 + 0.5 + 1e-3
    return outside


def find_grid(values: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """Return the grid for each row of `values`, (rows, columns) in float32.

    Without `importance` the grid spans the smallest and the largest value. With it, (columns,) or
    each row's own in (rows, columns), scale and zero point minimise sum_j importance_j
    (w_j - q_j)^2 among shrunken ranges, refitted by least squares to the integers that they lead
    to; with the diagonal of the Hessian this is the layer's output error but for its cross terms.
    A symmetric grid has one step more on one side: a negative scale turns it to where the row
    needs it.
    """
    whole = _full_range(values, bits, symmetric)
    if importance is None or not bool((importance > 0).any()):
        return whole
    at_once = WEIGHTS_AT_ONCE_ON_GPU if values.is_cuda else WEIGHTS_AT_ONCE
    rows = max(1, at_once // values.shape[1])
    pieces = zip(
        *(torch.split(each, rows) for each in (values, whole.scale, whole.zero)), strict=True
    )
    with one_thread():
        parts = [
            _search(
                piece.contiguous(),
                importance if importance.dim() == 1 else importance[i * rows : (i + 1) * rows],
                Grid(scale, zero, bits, symmetric),
            )
            for i, (piece, scale, zero) in enumerate(pieces)
        ]
    scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("scale", "zero"))
    return Grid(scale, zero, bits, symmetric)


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
    return Grid(storable(scale), zero, bits, symmetric)


def storable(scale: Tensor) -> Tensor:
    """Return the fp16 numbers nearest to `scale`, in its dtype, none of them 0 or infinite."""
    size = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(size, scale).half().to(scale.dtype)


class _Best:
    """The best grid of each row so far."""

    def __init__(self, values: Tensor, importance: Tensor, start: Grid) -> None:
        self.values, self.importance, self.grid = values, importance, start
        self.scratch = torch.empty_like(values)
        self.loss = self._loss(start)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take a grid, (rows, 1) each, in the rows in which it loses less."""
        grid = Grid(storable(scale), zero, self.grid.bits, self.grid.symmetric)
        loss = self._loss(grid)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        scale = torch.where(better, grid.scale, self.grid.scale)
        zero = torch.where(better, grid.zero, self.grid.zero)
        self.grid = Grid(scale, zero, grid.bits, grid.symmetric)

    def _loss(self, grid: Grid) -> Tensor:
        """Return sum_j importance_j (w_j - q_j)^2, (rows, 1)."""
        error = torch.div(self.values, grid.scale, out=self.scratch)
        error.round_().add_(grid.zero).clamp_(0, 2**grid.bits - 1)
        error.sub_(grid.zero).mul_(grid.scale).sub_(self.values)
        return _weighted(error.square_(), self.importance)


def _search(values: Tensor, importance: Tensor, whole: Grid) -> Grid:
    """Return the grid of each row whose weighted squared error is smallest among those tried."""
    best = _Best(values, importance, whole)
    if whole.symmetric:
        starts = [(_signed_range(values, whole.bits, sign), whole.zero) for sign in (1, -1)]
    else:
        top = 2**whole.bits - 1
        starts = [(whole.scale, (whole.zero + move).clamp(1, top)) for move in (-1, 0, 1)]
    for share in SHARES:
        for scale, zero in starts:
            best.offer(scale * share, zero)
    for _ in range(REFITS):
        best.offer(*_refit(values, importance, best.grid))
    return best.grid


def _signed_range(values: Tensor, bits: int, sign: int) -> Tensor:
    """Return the scales, (rows, 1), of symmetric grids that hold every value, of one sign."""
    below, above = 2 ** (bits - 1), 2 ** (bits - 1) - 1  # steps on either side of zero
    turned = values * sign
    low = turned.amin(dim=1, keepdim=True).clamp(max=0)
    high = turned.amax(dim=1, keepdim=True).clamp(min=0)
    return sign * torch.maximum(high / above, -low / below)


def _refit(values: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, (rows, 1) each, that fit the grid's integers best."""
    integers = grid.quantize(values)  # (rows, columns)
    zero = grid.zero
    if not grid.symmetric:
        # w = slope * integer + offset, by weighted least squares; the offset is -slope * zero.
        total = importance.sum(-1, keepdim=True)
        u = integers - _weighted(integers, importance) / total
        w_mean = _weighted(values, importance) / total
        u_mean = _weighted(integers, importance) / total
        slope = _weighted(u * values, importance) / _weighted(u * u, importance)
        fitted = torch.round(u_mean - w_mean / slope)
        usable = torch.isfinite(fitted)
        zero = torch.where(usable, fitted, zero).clamp(1, 2**grid.bits - 1)
    steps = integers - zero
    fitted = _weighted(steps * values, importance) / _weighted(steps * steps, importance)
    return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, grid.scale), zero


def _weighted(values: Tensor, importance: Tensor) -> Tensor:
    """Return each row's sum, (rows, 1), weighted by (columns,) or by (rows, columns)."""
    if importance.dim() == 1:
        return (values @ importance)[:, None]
    return (values * importance).sum(1, keepdim=True)
