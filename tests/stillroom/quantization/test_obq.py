import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import NotFiniteError, RecipeError
from stillroom.quantization.gptq import gptq
from stillroom.quantization.grid import Grid, find_grid
from stillroom.quantization.hessian import damp
from stillroom.quantization.obq import obq
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.rounding import round_to_nearest
from tests.stillroom.quantization.test_gptq import _layer, _slow_gptq


def _slow_obq(W, H, options):
    """The greedy quantizer row by row; the Hessian of what is left is inverted anew each time."""
    W = W.double().clone()
    out, columns = W.shape
    group = options.group_columns(columns)
    importance = H.diagonal().float() if options.weighted_grid else None
    damped = damp(H.double(), options.damping)
    integers = torch.zeros(out, columns)
    for row in range(out):
        grids = []
        for g in range(columns // group):
            part = slice(g * group, (g + 1) * group)
            weights = None if importance is None else importance[part]
            original = W[row : row + 1, part].float()
            grids.append(find_grid(original, options.bits, options.symmetric, weights))
        left = list(range(columns))
        while left:
            inverse = torch.linalg.inv(damped[left][:, left])
            best = None
            for place, j in enumerate(left):
                grid: Grid = grids[j // group]
                w = W[row : row + 1, j : j + 1]
                q = grid.quantize(w.float())
                error = float(w - grid.dequantize(q).double())
                beyond = bool(grid.clipped(w.float()))
                cost = -abs(error) if beyond else error**2 / float(inverse[place, place])
                if best is None or (not beyond, cost) < best[0]:
                    best = ((not beyond, cost), place, j, float(q), error)
            _, place, j, q, error = best
            integers[row, j] = q
            W[row, left] -= error / inverse[place, place] * inverse[:, place]
            left.remove(j)
    return integers


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, -1])
def test_the_integers_are_those_of_a_slow_greedy_search(bits, symmetric, group_size):
    W, H = _layer(seed=bits, out=4, columns=16)
    options = QuantizationOptions(bits, group_size, symmetric, damping=0.01)
    assert torch.equal(obq(W, H, options).weight.integers.float(), _slow_obq(W, H, options))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, -1])
def test_a_forced_order_gives_explicit_inverse_updates_and_gptq(bits, group_size):
    W, H = _layer(seed=bits)
    options = QuantizationOptions(bits, group_size, damping=0.01)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    forced = obq(W, H, options, order).weight
    assert torch.equal(forced.integers.float(), _slow_gptq(W, H, options))
    solved = gptq(W, H, options).weight
    for part in ("integers", "scales", "zeros"):
        assert torch.equal(getattr(forced, part), getattr(solved, part))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([2, 3, 4]))
def test_the_output_error_is_below_that_of_rounding(seed, symmetric, bits):
    W, H = _layer(seed, out=16)
    options = QuantizationOptions(bits, 8, symmetric, damping=0.01)
    solved, rounded = obq(W, H, options), round_to_nearest(W, options, H)
    assert solved.relative_error <= rounded.relative_error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_at_most_1_4_times_as_much(bits, symmetric):
    # Measured on 36 such layers: 0.73 to 1.65 on one, 0.84 to 1.36 on the sum of six. The
    # two orders trade places: at 4 bits GPTQ's is the better one more often.
    options = QuantizationOptions(bits, 8, symmetric, damping=0.01)
    pairs = []
    for seed in range(6):
        W, H = _layer(seed, out=16)
        pairs.append((gptq(W, H, options).relative_error, obq(W, H, options).relative_error))
    assert all(ours <= 1.75 * reference for ours, reference in pairs)
    assert sum(ours for ours, _ in pairs) <= 1.4 * sum(reference for _, reference in pairs)


def test_rows_do_not_depend_on_the_rows_they_are_worked_on_with(monkeypatch):
    W, H = _layer(seed=1)
    options = QuantizationOptions(3, 8, damping=0.05)
    together = obq(W, H, options)
    monkeypatch.setattr("stillroom.quantization.obq.BYTES_AT_ONCE", 3 * 8 * 32**2)
    alone = obq(W, H, options)
    assert torch.equal(together.weight.integers, alone.weight.integers)
    assert together.clipped == alone.clipped


def test_uncorrelated_inputs_leave_plain_rounding():
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    options = QuantizationOptions(3, 8, weighted_grid=False, damping=0.05)
    solved, rounded = obq(W, torch.eye(16), options), round_to_nearest(W, options)
    assert torch.equal(solved.weight.integers, rounded.weight.integers)
    assert torch.equal(solved.weight.scales, rounded.weight.scales)


@pytest.mark.parametrize("group_size", [8, -1])
def test_shapes_and_dtypes(group_size):
    W, H = _layer(seed=6)
    weight = obq(W, H, QuantizationOptions(4, group_size, damping=0.05)).weight
    groups = 4 if group_size == 8 else 1
    assert weight.integers.shape == (8, 32)
    assert weight.scales.shape == weight.zeros.shape == (8, groups)
    assert (weight.integers.dtype, weight.scales.dtype) == (torch.uint8, torch.float16)
    assert weight.zeros.dtype == torch.uint8


def test_a_large_layer_is_refused_before_any_work():
    W = torch.zeros(4096, 1024)
    with pytest.raises(RecipeError, match=r"up to 6.9e\+10: 4096 x 1024³ is 4.4e\+12; use gptq"):
        obq(W, torch.eye(1024), QuantizationOptions(4, 64, damping=0.05))


def test_a_nan_in_the_hessian_is_refused():
    with pytest.raises(NotFiniteError):
        obq(
            torch.ones(8, 8), torch.full((8, 8), torch.nan), QuantizationOptions(4, 8, damping=0.05)
        )


def _finite(solution):
    return bool(torch.isfinite(solution.weight.dequantize()).all()) and solution.damping > 0


def test_dead_inputs_keep_their_weights_rounded():
    W, H = _layer(seed=5)
    H[7], H[:, 7] = 0, 0
    options = QuantizationOptions(4, 8, True, weighted_grid=False, damping=0.05)
    solved, rounded = obq(W, H, options), round_to_nearest(W, options)
    assert torch.equal(solved.weight.integers[:, 7], rounded.weight.integers[:, 7])
    assert _finite(solved)


def test_only_dead_inputs_leave_plain_rounding():
    W, _ = _layer(seed=5)
    options = QuantizationOptions(4, 8, damping=0.05)
    solved, rounded = obq(W, torch.zeros(32, 32), options), round_to_nearest(W, options)
    assert torch.equal(solved.weight.integers, rounded.weight.integers)
    assert solved.relative_error == 0


@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_duplicate_columns_share_their_error(damping):
    # Sixteen pairs of equal inputs: one of each pair can make good all that the other loses.
    W, _ = _layer(seed=11)
    X = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)
    H = 2 * X.T @ X / 200
    options = QuantizationOptions(4, 8, damping=damping)
    solved, rounded = obq(W, H, options), round_to_nearest(W, options, H)
    assert _finite(solved)
    assert solved.relative_error < 0.8 * rounded.relative_error


@pytest.mark.parametrize("damping", [1e-8, 0.01])
def test_a_rank_1_hessian_costs_less_than_half(damping):
    W, _ = _layer(seed=12)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    H = 2 * x.T @ x
    options = QuantizationOptions(3, 8, damping=damping)
    solved, rounded = obq(W, H, options), round_to_nearest(W, options, H)
    assert _finite(solved)
    assert solved.relative_error < 0.4 * rounded.relative_error


def test_a_row_of_zeros_stays_zero():
    W, H = _layer(seed=13)
    W[3] = 0
    solved = obq(W, H, QuantizationOptions(4, 8, damping=0.05))
    assert solved.weight.dequantize()[3].abs().max() == 0


@pytest.mark.parametrize("group_size", [8, -1])
def test_one_outlier_a_million_times_the_rest(group_size):
    W, H = _layer(seed=14)
    W[0, 0] = 1e6 * W.abs().mean()
    options = QuantizationOptions(4, group_size, damping=0.05)
    solved, rounded = obq(W, H, options), round_to_nearest(W, options, H)
    assert _finite(solved)
    assert solved.relative_error <= 1.05 * rounded.relative_error
    others = obq(W[1:], H, options).weight.integers
    assert torch.equal(solved.weight.integers[1:], others)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_the_inputs_does_not_matter(size):
    W, H = _layer(seed=15)
    options = QuantizationOptions(3, 8, damping=0.05)
    assert torch.equal(
        obq(W, H * size, options).weight.integers, obq(W, H, options).weight.integers
    )


def test_one_input_is_plain_rounding():
    W = torch.randn(6, 1, generator=torch.Generator().manual_seed(3))
    options = QuantizationOptions(4, -1, damping=0.05)
    solved, rounded = obq(W, torch.full((1, 1), 3.0), options), round_to_nearest(W, options)
    assert solved.weight.dequantize().shape == (6, 1)
    assert (solved.weight.dequantize() - W).abs().max() <= (
        rounded.weight.dequantize() - W
    ).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    W, H = _layer(seed=7)
    options = QuantizationOptions(4, 8, damping=0.05)
    same = obq(W.to(dtype).float(), H, options).weight.integers
    assert torch.equal(obq(W.to(dtype), H, options).weight.integers, same)
