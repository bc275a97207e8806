import pytest
import torch

from stillroom.errors import NotFiniteError
from stillroom.quantization.hessian import (
    HessianAccumulator,
    combine,
    damp,
    inverse_cholesky,
)


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


@pytest.mark.parametrize("columns", [5, 256, 300, 600])
def test_the_symmetric_update_is_the_whole_product(columns):
    X = _inputs(80, columns)
    accumulator = HessianAccumulator(columns)
    accumulator.add(X)
    H = accumulator.hessian()
    assert torch.equal(H, H.T)
    assert torch.allclose(H, 2 * X.T @ X / 80, rtol=1e-3, atol=1e-4)


def test_the_statistics_of_parts_combine_to_those_of_the_whole():
    X, original = _inputs(50), _inputs(50, seed=1)
    parts = []
    for rows in (slice(0, 20), slice(20, 50), slice(0, 50)):
        accumulator = HessianAccumulator(6)
        accumulator.add(X[rows], original[rows])
        parts.append(accumulator.statistics())
    both, whole = combine(parts[0], parts[1]), parts[2]
    assert both.tokens == 50
    for name in ("hessian", "mean", "shift", "shift_mean"):
        assert torch.allclose(getattr(both, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_centred_statistics_are_those_of_inputs_less_their_mean():
    X, original = _inputs(50) + 3, _inputs(50, seed=1) - 1
    statistics = []
    shift = original - X
    for inputs, other in ((X, original), (X - X.mean(0), (shift - shift.mean(0)) + X - X.mean(0))):
        accumulator = HessianAccumulator(6)
        accumulator.add(inputs, other)
        statistics.append(accumulator.statistics())
    centred, expected = statistics[0].centred(), statistics[1]
    assert torch.allclose(centred.hessian, expected.hessian, rtol=1e-3, atol=1e-3)
    assert torch.allclose(centred.shift, expected.shift, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.01, 1e-4])
def test_the_factor_holds_in_float32_where_the_damping_lets_it(damping):
    # Wider than a panel, and all but singular: eight directions hold nearly everything.
    X = _inputs(40, 8) @ _inputs(8, 700, seed=1) + 1e-3 * _inputs(40, 700, seed=2)
    H = 2 * X.T @ X / len(X)
    upper = inverse_cholesky(H, damping).upper
    exact = torch.linalg.inv(damp(H, damping).double())
    found = upper.double().T @ upper.double()
    assert torch.equal(upper, upper.triu())
    assert (found - exact).norm() < 1e-3 * exact.norm()
