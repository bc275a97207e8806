"""The second-order statistics of a linear layer's inputs (GPTQ, 2210.17323, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.errors import NotFiniteError, NotPositiveDefiniteError

RETRIES = 6
SMALLEST_RETRY = 1e-6  # of the damping
# Columns of one product of the symmetric update: small enough to save nearly half the work, large
# enough that each product runs at full speed.
PANEL = 256
# Up to this condition number a matrix is inverted in float32.
LARGEST_CONDITION = 1e6


@dataclass(frozen=True)
class Statistics:
    """Means over tokens of what a layer sees: x now, and x' in the full-precision model."""

    hessian: Tensor  # (in, in), 2 E[x xᵀ]
    mean: Tensor  # (in,), E[x]
    tokens: int
    shift: Tensor | None = None  # (in, in), 2 E[(x' - x) xᵀ]; None where x' was not followed
    shift_mean: Tensor | None = None  # (in,), E[x' - x]

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        found = (self.hessian, self.mean, self.shift, self.shift_mean)
        return all(bool(torch.isfinite(each).all()) for each in found if each is not None)

    def centred(self) -> "Statistics":
        """Return the statistics about the means: those of a layer whose bias is free to move."""
        mean = self.mean
        H = self.hessian - 2 * torch.outer(mean, mean)
        # A constant input leaves a difference of two equal numbers, which rounding can turn.
        H.diagonal().clamp_(min=0)
        shift = self.shift
        if shift is not None and self.shift_mean is not None:
            shift = shift - 2 * torch.outer(self.shift_mean, mean)
        return Statistics(H, mean, self.tokens, shift, self.shift_mean)


class HessianAccumulator:
    """The mean over tokens of 2 x xᵀ, for the inputs x that a linear layer sees.

    Layers that get the same input share one.
    """

    def __init__(self, in_features: int, dtype: torch.dtype = torch.float32) -> None:
        self.in_features = in_features
        self.dtype = dtype
        self.tokens = 0
        self._products: Tensor | None = None  # (in, in), Σ x xᵀ: diagonal panels and above
        self._sum: Tensor | None = None  # (in,), Σ x
        self._shifts: Tensor | None = None  # (in, in), Σ (x' - x) xᵀ
        self._shift_sum: Tensor | None = None  # (in,), Σ (x' - x)

    def add(self, inputs: Tensor, full_precision: Tensor | None = None) -> None:
        """Add inputs, (tokens, in), of any floating dtype, and what they are in full precision."""
        X = inputs.to(self.dtype)
        if self._products is None or self._sum is None:
            self._products = X.new_zeros(self.in_features, self.in_features)
            self._sum = X.new_zeros(self.in_features)
        for start in range(0, self.in_features, PANEL):
            panel = slice(start, start + PANEL)
            self._products[panel, start:].addmm_(X[:, panel].T, X[:, start:])
        self._sum += X.sum(0)
        self.tokens += X.shape[0]
        if full_precision is not None:
            shift = full_precision.to(self.dtype) - X
            if self._shifts is None or self._shift_sum is None:
                self._shifts = torch.zeros_like(self._products)
                self._shift_sum = torch.zeros_like(self._sum)
            self._shifts.addmm_(shift.T, X)
            self._shift_sum += shift.sum(0)

    def hessian(self) -> Tensor | None:
        """Return H = 2 Σ x xᵀ / tokens, (in, in); nothing where no token came."""
        found = self.statistics()
        return None if found is None else found.hessian

    def statistics(self) -> Statistics | None:
        """Return the means over all tokens; nothing where no token came."""
        if self._products is None or self._sum is None or self.tokens == 0:
            return None
        upper = self._products.triu()
        H = (upper + upper.triu(1).T).mul_(2 / self.tokens)
        shift, shift_mean = self._shifts, self._shift_sum
        return Statistics(
            hessian=H,
            mean=self._sum / self.tokens,
            tokens=self.tokens,
            shift=None if shift is None else shift * (2 / self.tokens),
            shift_mean=None if shift_mean is None else shift_mean / self.tokens,
        )


def combine(first: Statistics, second: Statistics) -> Statistics:
    """Return the statistics over the tokens of both."""
    tokens = first.tokens + second.tokens
    share = first.tokens / tokens

    def mix(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        return None if ours is None or theirs is None else torch.lerp(theirs, ours, share)

    return Statistics(
        hessian=torch.lerp(second.hessian, first.hessian, share),
        mean=torch.lerp(second.mean, first.mean, share),
        tokens=tokens,
        shift=mix(first.shift, second.shift),
        shift_mean=mix(first.shift_mean, second.shift_mean),
    )


@dataclass(frozen=True)
class InverseFactor:
    """The Cholesky factor of an inverse Hessian, and the damping that made it possible."""

    upper: Tensor  # (in, in) float32, H⁻¹ = upperᵀ upper
    damping: float  # share of the mean of the diagonal


def damp(H: Tensor, damping: float) -> Tensor:
    """Return H, (in, in), with `damping` times the mean of its diagonal added to the diagonal.

    Inputs that were always zero get the mean instead of zero: nothing ties them to others, so
    their weights are merely rounded. The mean is over the inputs that are alive.
    """
    damped = H.clone()
    diagonal = damped.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_ones(())
    diagonal[~alive] = mean
    diagonal += damping * mean
    return damped


def inverse_cholesky(H: Tensor, damping: float) -> InverseFactor:
    """Return the upper Cholesky factor of the damped inverse of H, (in, in).

    Computed from one factorisation: with R upper and H = R Rᵀ, H⁻¹ = R⁻ᵀ R⁻¹; in float32 where
    the damping leaves it enough digits, else in float64. Where the damped H is not positive
    definite, the damping grows tenfold until it is; what was used is returned.

    Raises:
        NotFiniteError: H holds a NaN or an infinity.
        NotPositiveDefiniteError: no damping that was tried is enough.
    """
    if not bool(torch.isfinite(H).all()):
        raise NotFiniteError("the Hessian holds a NaN or an infinity")
    last = used = damping
    for _ in range(RETRIES):
        damped = damp(H, used)
        # The largest eigenvalue is at most the trace, the smallest at least the damping.
        if used * LARGEST_CONDITION >= len(H):
            upper = _inverse_upper(damped)
            if upper is not None:
                return InverseFactor(upper, used)
        upper = _inverse_upper(damped.double())
        if upper is not None:
            return InverseFactor(upper.float(), used)
        last, used = used, max(10 * used, SMALLEST_RETRY)
    raise NotPositiveDefiniteError(
        f"the Hessian is not positive definite with damping {last:g}; "
        f"use more calibration text or a damping above {damping:g}"
    )


def _inverse_upper(H: Tensor) -> Tensor | None:
    """Return U with H⁻¹ = Uᵀ U, in H's dtype, or nothing where H is not positive definite.

    Each step lets go of what came before: these are the largest matrices of all.
    """
    # Flipping both axes turns the lower factor of the flipped matrix into the upper one of H.
    lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(failed):
        return None
    R = lower.flip(0, 1)
    del lower
    inverse = torch.zeros_like(R)
    _invert_upper(R, inverse)
    return inverse if bool(torch.isfinite(inverse).all()) else None


def _invert_upper(R: Tensor, out: Tensor) -> None:
    """Write the inverse of R, upper triangular, into `out`, which is zero.

    By halves, ((A, B), (0, C))⁻¹ = ((A⁻¹, -A⁻¹ B C⁻¹), (0, C⁻¹)): nearly all of it is products.
    """
    size = len(R)
    if size <= PANEL:
        eye = torch.eye(size, dtype=R.dtype, device=R.device)
        out.copy_(torch.linalg.solve_triangular(R, eye, upper=True))
        return
    half = size // 2
    _invert_upper(R[:half, :half], out[:half, :half])
    _invert_upper(R[half:, half:], out[half:, half:])
    out[:half, half:] = (out[:half, :half] @ R[:half, half:]).neg_() @ out[half:, half:]
