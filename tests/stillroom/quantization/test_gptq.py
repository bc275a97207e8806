import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import NotFiniteError
from stillroom.quantization.gptq import gptq
from stillroom.quantization.grid import find_grid
from stillroom.quantization.hessian import damp
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.rounding import round_to_nearest


def _layer(seed, out=8, columns=32, tokens=200):
    """Return a weight, and a Hessian of inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    decay = torch.linspace(1, 0.05, columns)
    X = (torch.randn(tokens, columns, generator=generator) * decay) @ mixing
    return W, 2 * X.T @ X / tokens


def _slow_gptq(W, H, options):
    """Optimal Brain Quantization in a fixed order: the inverse is updated after each column.

    Equations 2 and 3 of the paper in float64, no Cholesky factor, no blocks.
    """
    W = W.double().clone()
    out, columns = W.shape
    group = options.group_columns(columns)
    importance = H.diagonal().float() if options.weighted_grid else None

    def grid_of(values, g):
        part = slice(g * group, (g + 1) * group)
        weights = None if importance is None else importance[part]
        return find_grid(values[:, part].float(), options.bits, options.symmetric, weights)

    order = list(range(columns))
    grids = {}
    if options.act_order:
        order.sort(key=lambda j: -float(H[j, j]))
        grids = {g: grid_of(W, g) for g in range(columns // group)}
    inverse = torch.linalg.inv(damp(H.double(), options.damping))
    left = torch.ones(columns, dtype=torch.bool)
    integers = torch.zeros(out, columns)
    for j in order:
        if not options.act_order and j % group == 0:
            grids[j // group] = grid_of(W, j // group)
        grid = grids[j // group]
        q = grid.quantize(W[:, j : j + 1].float())
        integers[:, j] = q[:, 0]
        error = (W[:, j] - grid.dequantize(q)[:, 0].double()) / inverse[j, j]
        left[j] = False
        W -= torch.outer(error, inverse[j]) * left
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return integers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [8, -1])
def test_the_integers_are_those_of_explicit_inverse_updates(bits, symmetric, act_order, group_size):
    W, H = _layer(seed=bits)
    options = QuantizationOptions(bits, group_size, symmetric, act_order, damping=0.01)
    solution = gptq(W, H, options)
    assert torch.equal(solution.weight.integers.float(), _slow_gptq(W, H, options))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, -1])
def test_block_sizes_1_8_and_128_give_the_same(act_order, group_size):
    W, H = _layer(seed=3)
    first, *others = (
        gptq(W, H, QuantizationOptions(3, group_size, True, act_order, block_size=size)).weight
        for size in (1, 8, 128)
    )
    for other in others:
        assert torch.equal(first.integers, other.integers)
        assert torch.equal(first.scales, other.scales)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_uncorrelated_inputs_of_one_size_leave_plain_rounding(seed, symmetric, act_order, bits):
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    options = QuantizationOptions(bits, 8, symmetric, act_order, weighted_grid=False)
    solved, rounded = gptq(W, torch.eye(16), options), round_to_nearest(W, options)
    assert torch.equal(solved.weight.integers, rounded.weight.integers)
    assert torch.equal(solved.weight.scales, rounded.weight.scales)
    assert solved.relative_error == pytest.approx(rounded.relative_error)
    assert solved.clipped == rounded.clipped


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([2, 3, 4]))
def test_the_output_error_is_below_that_of_rounding(seed, symmetric, act_order, bits):
    W, H = _layer(seed, out=16)
    options = QuantizationOptions(bits, 8, symmetric, act_order, damping=0.01)
    solved, rounded = gptq(W, H, options), round_to_nearest(W, options, H)
    assert solved.relative_error <= rounded.relative_error


def test_the_relative_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(8, 32, generator=generator), torch.randn(100, 32, generator=generator)
    solution = gptq(W, 2 * X.T @ X / 100, QuantizationOptions(3, 8))
    outputs, lossy = X @ W.T, X @ solution.weight.dequantize().T
    expected = (outputs - lossy).square().sum() / outputs.square().sum()
    assert solution.relative_error == pytest.approx(float(expected), rel=1e-4)


def test_the_weighted_grid_lowers_the_error_at_three_bits():
    pairs = []
    for seed in range(5):
        W, H = _layer(seed, out=32)
        plain, weighted = (
            gptq(W, H, QuantizationOptions(3, 32, True, weighted_grid=flag)).relative_error
            for flag in (False, True)
        )
        pairs.append((plain, weighted))
    assert sum(weighted for _, weighted in pairs) < 0.9 * sum(plain for plain, _ in pairs)


def test_dead_inputs_keep_their_weights_rounded():
    W, H = _layer(seed=5)
    H[7], H[:, 7] = 0, 0
    options = QuantizationOptions(4, 8, True, weighted_grid=False)
    solved, rounded = gptq(W, H, options).weight, round_to_nearest(W, options).weight
    assert torch.equal(solved.integers[:, 7], rounded.integers[:, 7])


@pytest.mark.parametrize("group_size", [8, -1])
def test_shapes_and_dtypes(group_size):
    W, H = _layer(seed=6)
    weight = gptq(W, H, QuantizationOptions(4, group_size)).weight
    groups = 4 if group_size == 8 else 1
    assert weight.integers.shape == (8, 32)
    assert weight.scales.shape == weight.zeros.shape == (8, groups)
    assert (weight.integers.dtype, weight.scales.dtype) == (torch.uint8, torch.float16)
    assert weight.zeros.dtype == torch.uint8
    assert weight.group_size == 32 // groups


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    W, H = _layer(seed=7)
    options = QuantizationOptions(4, 8)
    same = gptq(W.to(dtype).float(), H, options).weight.integers
    assert torch.equal(gptq(W.to(dtype), H, options).weight.integers, same)


def test_one_outlier_does_not_stop_it():
    W, H = _layer(seed=8)
    W[0, 0] = 1e4
    solution = gptq(W, H, QuantizationOptions(4, 8))
    assert torch.isfinite(solution.weight.dequantize()).all()
    assert solution.relative_error < 1


def test_a_layer_of_zeros_is_exact():
    _, H = _layer(seed=9)
    solution = gptq(torch.zeros(8, 32), H, QuantizationOptions(4, 8))
    assert solution.weight.dequantize().abs().max() == 0
    assert solution.relative_error == 0


def test_a_nan_in_the_hessian_is_refused():
    with pytest.raises(NotFiniteError):
        gptq(torch.ones(8, 8), torch.full((8, 8), torch.nan), QuantizationOptions(4, 8))
