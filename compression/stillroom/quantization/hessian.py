"""The second-order statistics of a linear layer's inputs (GPTQ, 2210.17323, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.errors import NotFiniteError, NotPositiveDefiniteError

RETRIES = 6


class HessianAccumulator:
    """The mean over tokens of 2 x xᵀ, for the inputs x that a linear layer sees.

    Layers that get the same input share one.
    """

    def __init__(self, in_features: int, dtype: torch.dtype = torch.float32) -> None:
        self.total: Tensor | None = None
        self.in_features = in_features
        self.dtype = dtype
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs, (tokens, in), of any floating dtype."""
        X = inputs.to(self.dtype)
        if self.total is None:
            self.total = torch.zeros(
                self.in_features, self.in_features, dtype=self.dtype, device=X.device
            )
        self.total.addmm_(X.T, X)
        self.tokens += X.shape[0]

    def hessian(self) -> Tensor | None:
        """Return H = 2 Σ x xᵀ / tokens, (in, in); nothing where no token came."""
        if self.total is None or self.tokens == 0:
            return None
        return self.total * (2 / self.tokens)


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

    Computed in float64 from one factorisation: with R upper and H = R Rᵀ, H⁻¹ = R⁻ᵀ R⁻¹. Where
    the damped H is not positive definite, the damping grows tenfold until it is; what was used
    is returned.

    Raises:
        NotFiniteError: H holds a NaN or an infinity.
        NotPositiveDefiniteError: no damping that was tried is enough.
    """
    if not bool(torch.isfinite(H).all()):
        raise NotFiniteError("the Hessian holds a NaN or an infinity")
    used = damping
    for _ in range(RETRIES):
        damped = damp(H.double(), used)
        # Flipping both axes turns the lower factor of the flipped matrix into the upper one of H.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            R = lower.flip(0, 1)
            identity = torch.eye(H.shape[0], dtype=R.dtype, device=R.device)
            upper = torch.linalg.solve_triangular(R, identity, upper=True)
            if bool(torch.isfinite(upper).all()):
                return InverseFactor(upper.float(), used)
        used *= 10
    raise NotPositiveDefiniteError(
        f"the Hessian is not positive definite with damping {used / 10:g}; "
        f"use more calibration text or a damping above {damping:g}"
    )
