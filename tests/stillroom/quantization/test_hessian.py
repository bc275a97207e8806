import pytest
import torch

from stillroom.errors import NotFiniteError
from stillroom.quantization.hessian import HessianAccumulator, damp, inverse_cholesky


def _inputs(tokens=50, columns=6, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def test_accumulating_in_parts_is_twice_the_mean_of_outer_products():
    X = _inputs()
    accumulator = HessianAccumulator(6)
    accumulator.add(X[:13])
    accumulator.add(X[13:])
    expected = sum(2 * torch.outer(x, x) for x in X) / len(X)
    assert torch.allclose(accumulator.hessian(), expected, rtol=1e-4, atol=1e-5)
    assert accumulator.tokens == 50


def test_without_tokens_there_is_no_hessian():
    accumulator = HessianAccumulator(6)
    assert accumulator.hessian() is None
    accumulator.add(torch.zeros(0, 6))
    assert accumulator.hessian() is None


def test_damping_adds_a_share_of_the_mean_of_the_live_diagonal():
    H = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    damped = damp(H, 0.1)
    assert torch.allclose(damped.diagonal(), torch.tensor([1.2, 3.2, 2.2]))
    assert torch.equal(H, torch.diag(torch.tensor([1.0, 3.0, 0.0])))


def test_the_factor_multiplies_to_the_inverse():
    X = _inputs().double()
    H = 2 * X.T @ X / len(X)
    factor = inverse_cholesky(H, 0.01)
    U = factor.upper.double()
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U, torch.linalg.inv(damp(H, 0.01)), rtol=1e-4, atol=1e-5)
    assert factor.damping == 0.01


@pytest.mark.parametrize(
    "X",
    [
        torch.ones(20, 6),
        torch.cat([_inputs(columns=3)] * 2, dim=1),
        _inputs(tokens=1),
        torch.zeros(4, 6),
        _inputs() * torch.tensor([1e6, 1, 1, 1, 1, 1]),
    ],
    ids=["rank one", "duplicate columns", "one token", "dead", "an outlier"],
)
def test_degenerate_inputs_give_a_finite_factor(X):
    factor = inverse_cholesky(2 * X.T @ X / len(X), 0.01)
    assert torch.isfinite(factor.upper).all()


def test_an_indefinite_matrix_raises_the_damping_and_says_so():
    H = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    factor = inverse_cholesky(H, 0.1)
    assert factor.damping == pytest.approx(1.0)


def test_nan_is_refused():
    with pytest.raises(NotFiniteError, match="Hessian"):
        inverse_cholesky(torch.full((2, 2), torch.nan), 0.1)
