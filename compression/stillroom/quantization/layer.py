"""Quantize the layers that share an input, with every choice made on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillroom.quantization.gptq import Rounded, column_order, find_grids, solve
from stillroom.quantization.hessian import (
    InverseFactor,
    Statistics,
    combine,
    damp,
    inverse_cholesky,
)
from stillroom.quantization.options import DEFAULT_DAMPING, QuantizationOptions
from stillroom.quantization.refine import refine
from stillroom.quantization.weight import QuantizedWeight, Solution

DAMPINGS = (0.01, 0.03, 0.1, 0.3)
ALPHAS = (0.25, 0.5, 0.75, 1.0)
# Output rows on which the choices are made: rows do not depend on one another.
ROWS_TO_CHOOSE_ON = 192
# Numbers in the factors of the dampings that are tried side by side.
FACTORS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Choice:
    """What the held-out rows preferred."""

    damping: float
    alpha: float = 0.0  # share of the cross-layer term
    refined: bool = False
    # (rows, 2): lost and whole energy on held-out rows of the text, after one round if refined
    errors: Tensor | None = None
    every: int = 1  # of which output rows these are: each `every`-th


@dataclass(frozen=True)
class Problem:
    """A weight (out, in), what its inputs are like, and the order of its columns."""

    W: Tensor
    statistics: Statistics
    order: Tensor

    def factor(self, damping: float) -> InverseFactor:
        """Return the factor of the damped inverse Hessian, in `order`."""
        return inverse_cholesky(self.statistics.hessian[self.order][:, self.order], damping)

    def correction(self, factor: InverseFactor) -> Tensor | None:
        """Return W E[(x' - x) xᵀ] H⁻¹, (out, in): what makes good the loss of the layers before.

        W with it is the weight that maps the inputs x of today best to the outputs W x' of the
        full-precision model (GPTAQ, 2504.02692; QEP, 2504.09629).
        """
        shift = self.statistics.shift
        if shift is None:
            return None
        found = torch.empty_like(self.W)
        found[:, self.order] = (self.W @ shift)[:, self.order] @ factor.upper.T @ factor.upper
        return found


def quantize_together(
    W: Tensor,
    sizes: Sequence[int],
    bias: Tensor | None,
    train: Statistics,
    held_out: Statistics | None,
    options: QuantizationOptions,
) -> list[Solution]:
    """Return the solutions of layers that share an input and lie one below the other in W.

    Damping, cross-layer share and whether to refine are chosen by what they lose on the
    `held_out` rows when solved on the `train` rows; the result is then solved on both. Without
    held-out rows nothing is chosen, and coordinate descent and the cross-layer term are left out.

    Args:
        W: (out, in) float32, the layers' weights.
        sizes: rows of each layer; they add up to out.
        bias: (out,), or None. With a bias the inputs count about their mean, and the bias takes
            up what the mean loses.
        train: the inputs' statistics.
        held_out: the same of rows that are not in `train`.
        options: what to do.

    Raises:
        NotFiniteError: the statistics hold a NaN or an infinity.
        NotPositiveDefiniteError: the Hessian cannot be inverted with any damping.
    """
    uncentred = train if held_out is None else combine(train, held_out)
    if bias is not None and options.bias_correction:
        train, held_out = train.centred(), None if held_out is None else held_out.centred()
    whole = uncentred.centred() if bias is not None and options.bias_correction else uncentred
    order = column_order(whole.hessian, options)
    choice = _choose(W, order, train, held_out, options)
    problem = Problem(W, whole, order)
    factor = problem.factor(choice.damping)
    correction = problem.correction(factor) if choice.alpha else None
    target = W if correction is None else torch.add(W, correction, alpha=choice.alpha)
    rounded = _round(target[None], factor.upper[None], problem, options)
    weight = rounded.weight(0)
    if choice.refined:
        H = damp(whole.hessian, factor.damping)
        weight = refine(target, H, weight, options.refinements)
    corrected = None
    if bias is not None and options.bias_correction:
        corrected = _corrected_bias(W, weight, bias, uncentred)
    bounds = _babai_bounds(rounded, factor, order)  # (out,)
    made = Solution(
        weight, 0, factor.damping, 0, corrected, alpha=choice.alpha, refined=choice.refined
    )
    return _split(W, sizes, made, bounds, whole.hessian, choice, rounded.clipped[0])


def _choose(
    W: Tensor,
    order: Tensor,
    train: Statistics,
    held_out: Statistics | None,
    options: QuantizationOptions,
) -> Choice:
    """Return what loses least on the held-out rows, measured on some rows of W."""
    if held_out is None:
        return Choice(DEFAULT_DAMPING if options.damping is None else options.damping, 0.0, False)
    every = max(1, W.shape[0] // ROWS_TO_CHOOSE_ON)
    problem = Problem(W[::every].contiguous(), train, order)
    measure = _Measure(problem.W, held_out)
    dampings = DAMPINGS if options.damping is None else (options.damping,)
    factor, weight, loss = _best_damping(problem, dampings, measure, options)
    alpha, target = 0.0, problem.W
    correction = problem.correction(factor) if options.cross_layer else None
    if correction is not None:
        targets = torch.stack([problem.W.add(correction, alpha=other) for other in ALPHAS])
        rounded = _round(targets, factor.upper[None], problem, options)
        for version, other in enumerate(ALPHAS):
            tried = rounded.weight(version)
            lost = measure.loss(tried)
            if lost < loss:
                alpha, target, weight, loss = other, targets[version], tried, lost
    refined = False
    if options.refinements:
        # One round tells whether it helps.
        tried = refine(target, damp(train.hessian, factor.damping), weight, 1)
        refined = measure.loss(tried) < loss
        weight = tried if refined else weight
    errors = _row_errors(problem.W, weight, held_out.hessian)
    return Choice(factor.damping, alpha, refined, errors, every)


def _best_damping(
    problem: Problem,
    dampings: Sequence[float],
    measure: "_Measure",
    options: QuantizationOptions,
) -> tuple[InverseFactor, QuantizedWeight, float]:
    """Return the factor that loses least on the held-out rows, its weight and the loss."""
    at_once = max(1, FACTORS_AT_ONCE // problem.W.shape[1] ** 2)
    if not options.act_order:
        at_once = 1  # grids that are found on the way differ from damping to damping
    best: tuple[InverseFactor, QuantizedWeight, float] | None = None
    for start in range(0, len(dampings), at_once):
        factors = [problem.factor(damping) for damping in dampings[start : start + at_once]]
        upper = torch.stack([factor.upper for factor in factors])
        rounded = _round(problem.W[None], upper, problem, options)
        for version, factor in enumerate(factors):
            weight = rounded.weight(version)
            loss = measure.loss(weight)
            if best is None or loss < best[2]:
                best = (factor, weight, loss)
    assert best is not None
    return best


def _round(W: Tensor, upper: Tensor, problem: Problem, options: QuantizationOptions) -> Rounded:
    """Return W, (versions, out, in), rounded with the factors, (versions, in, in).

    One of either serves all versions of the other. With act-order all share the first one's grids.
    """
    H = problem.statistics.hessian
    grids = find_grids(W[0], H, options) if options.act_order else None
    return solve(W, upper.to(W.device), problem.order, grids, options, H.diagonal())


class _Measure:
    """What rounding W, (out, in), loses on the rows of some statistics."""

    def __init__(self, W: Tensor, statistics: Statistics) -> None:
        self.W, self.H = W, statistics.hessian
        self.shifted = None if statistics.shift is None else 2 * (W @ statistics.shift)

    def loss(self, weight: QuantizedWeight) -> float:
        """Return 2 E |W x' - Q x|² but for what does not depend on Q."""
        D = self.W - weight.dequantize()
        lost = D @ self.H
        if self.shifted is not None:
            lost += self.shifted
        return float((lost * D).sum(dtype=torch.float64))


def _corrected_bias(W: Tensor, weight: QuantizedWeight, bias: Tensor, seen: Statistics) -> Tensor:
    """Return b + W E[x'] - Q E[x], (out,): the bias with which the outputs keep their mean."""
    intended = seen.mean if seen.shift_mean is None else seen.mean + seen.shift_mean
    return bias + W @ intended - weight.dequantize() @ seen.mean


def _babai_bounds(rounded: Rounded, factor: InverseFactor, order: Tensor) -> Tensor:
    """Return the largest error that rounding can leave in each row, (out,), if nothing is clipped.

    GPTQ is Babai's nearest plane algorithm (2507.18553): column i leaves at most a quarter of its
    squared step, scaled by 1 / U_ii².
    """
    scales = rounded.grids.scale  # (out, groups)
    group = len(order) // scales.shape[1]
    weights = torch.zeros(scales.shape[1], device=scales.device)
    weights.index_add_(0, order // group, factor.upper.diagonal().to(scales.device) ** -2)
    bounds: Tensor = (scales**2) @ weights / 4
    return bounds


def _row_errors(W: Tensor, weight: QuantizedWeight, H: Tensor) -> Tensor:
    """Return what each row's output loses and its whole energy, (rows, 2)."""
    D = W - weight.dequantize()
    return torch.stack([((D @ H) * D).sum(1), ((W @ H) * W).sum(1)], dim=1)


def _split(
    W: Tensor,
    sizes: Sequence[int],
    made: Solution,
    bounds: Tensor,
    H: Tensor,
    choice: Choice,
    clipped: Tensor,
) -> list[Solution]:
    """Return the solution of each of the layers that were solved together."""
    errors = _row_errors(W, made.weight, H)
    solutions: list[Solution] = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        held_out = None
        if choice.errors is not None:
            chosen = torch.arange(0, W.shape[0], choice.every)
            inside = (chosen >= start) & (chosen < start + size)
            if bool(inside.any()):  # a small layer may have none of the rows
                held_out = _share(*choice.errors[inside.to(choice.errors.device)].double().sum(0))
        energy = errors[rows, 1].double().sum()
        solutions.append(
            replace(
                made,
                weight=made.weight.rows(start, start + size),
                relative_error=_share(errors[rows, 0].double().sum(), energy),
                clipped=int(clipped[rows].sum()),
                bias=None if made.bias is None else made.bias[rows],
                held_out_error=held_out,
                # The cross-layer term moves the weight away from W, and the bound with it.
                babai_bound=None if choice.alpha else _share(bounds[rows].double().sum(), energy),
            )
        )
        start += size
    return solutions


def _share(lost: Tensor, whole: Tensor) -> float:
    return max(float(lost), 0.0) / float(whole) if float(whole) > 0 else 0.0
