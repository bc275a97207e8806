import pytest
import torch

from stillroom.quantization.gptq import gptq
from stillroom.quantization.hessian import HessianAccumulator, Statistics
from stillroom.quantization.layer import quantize_together
from stillroom.quantization.options import QuantizationOptions

OPTIONS = QuantizationOptions(3, 8)


def _inputs(seed, tokens=400, columns=32, mean=0.0):
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99))
    X = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return (X * torch.linspace(1, 0.1, columns)) @ mixing + mean


def _statistics(X, original=None) -> Statistics:
    accumulator = HessianAccumulator(X.shape[1])
    accumulator.add(X, original)
    found = accumulator.statistics()
    assert found is not None
    return found


def _weight(seed=0, out=12, columns=32):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def _lost(W, solution, X, original=None):
    target = (X if original is None else original) @ W.T
    return float((target - X @ solution.weight.dequantize().T).square().mean())


def test_layers_solved_together_are_those_solved_alone():
    W = _weight()
    train, held_out = _statistics(_inputs(1)), _statistics(_inputs(2, 60))
    options = QuantizationOptions(3, 8, damping=0.05, cross_layer=False)
    both = quantize_together(W, [8, 4], None, train, held_out, options)
    for rows, solution in zip((slice(0, 8), slice(8, 12)), both, strict=True):
        (alone,) = quantize_together(W[rows], [len(W[rows])], None, train, held_out, options)
        if both[0].refined == alone.refined:
            assert torch.equal(alone.weight.integers, solution.weight.integers)
        assert solution.relative_error == pytest.approx(alone.relative_error, rel=0.2)


def test_a_layer_without_a_row_to_choose_on_states_no_held_out_error():
    """Of 1544 rows every eighth is chosen on; the last seven lie between two of them."""
    W = _weight(out=1544)
    train, held_out = _statistics(_inputs(1)), _statistics(_inputs(2, 60))
    large, small = quantize_together(W, [1537, 7], None, train, held_out, OPTIONS)
    assert large.held_out_error is not None
    assert small.relative_error > 0
    assert small.held_out_error is None


def test_without_anything_beyond_it_it_is_gptq():
    W, statistics = _weight(), _statistics(_inputs(1))
    options = QuantizationOptions(3, 8, damping=0.05, refinements=0, cross_layer=False)
    (solution,) = quantize_together(W, [12], None, statistics, None, options)
    plain = gptq(W, statistics.hessian, options)
    assert torch.equal(solution.weight.integers, plain.weight.integers)
    assert solution.relative_error == pytest.approx(plain.relative_error, rel=1e-4)


def test_damping_comes_from_the_held_out_rows():
    """Few tokens: without damping the solution fits their noise."""
    W, few = _weight(), _inputs(1, tokens=40)
    held_out = _statistics(_inputs(2, 200))
    (solution,) = quantize_together(W, [12], None, _statistics(few), held_out, OPTIONS)
    assert solution.damping in (0.01, 0.03, 0.1, 0.3)
    assert solution.held_out_error is not None
    fresh = _inputs(3, 2000)
    losses = {}
    for damping in (0.01, solution.damping):
        options = QuantizationOptions(3, 8, damping=damping)
        (fixed,) = quantize_together(W, [12], None, _statistics(few), None, options)
        losses[damping] = _lost(W, fixed, fresh)
    assert losses[solution.damping] < losses[0.01]


def test_refinement_loses_less_on_fresh_inputs():
    W, train, held_out = _weight(), _statistics(_inputs(1)), _statistics(_inputs(2, 100))
    fresh = _inputs(3, 2000)
    with_it, without = (
        quantize_together(W, [12], None, train, held_out, QuantizationOptions(3, 8, refinements=n))
        for n in (2, 0)
    )
    assert with_it[0].refined
    assert _lost(W, with_it[0], fresh) < _lost(W, without[0], fresh)


def test_the_cross_layer_term_makes_good_what_the_layers_before_lost():
    W = _weight()
    noise = 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(7))

    def pair(seed, tokens):
        original = _inputs(seed, tokens)
        return original + original @ noise / 6, original  # now, in full precision

    train, held_out = (_statistics(*pair(*each)) for each in ((1, 400), (2, 100)))
    fresh, original = pair(3, 2000)
    options = QuantizationOptions(4, 8)
    (with_it,) = quantize_together(W, [12], None, train, held_out, options)
    (without,) = quantize_together(
        W, [12], None, train, held_out, QuantizationOptions(4, 8, cross_layer=False)
    )
    assert with_it.alpha > 0
    assert without.alpha == 0
    assert _lost(W, with_it, fresh, original) < _lost(W, without, fresh, original)


def test_a_bias_takes_up_the_mean():
    W, bias = _weight(), torch.ones(12)
    X, fresh = _inputs(1, mean=2.0), _inputs(3, 2000, mean=2.0)
    held_out = _statistics(_inputs(2, 100, mean=2.0))
    (solution,) = quantize_together(W, [12], bias, _statistics(X), held_out, OPTIONS)
    assert solution.bias is not None
    outputs = fresh @ solution.weight.dequantize().T + solution.bias
    difference = (outputs - (fresh @ W.T + bias)).mean(0)
    uncorrected = (fresh @ (solution.weight.dequantize() - W).T).mean(0)
    assert difference.abs().max() < 0.2 * uncorrected.abs().max()
    (kept,) = quantize_together(
        W, [12], bias, _statistics(X), held_out, QuantizationOptions(3, 8, bias_correction=False)
    )
    assert kept.bias is None


@pytest.mark.parametrize("bits", [4, 8])
def test_no_unclipped_rounding_by_gptq_is_worse_than_babais_bound(bits):
    options = QuantizationOptions(bits, 8, weighted_grid=False, damping=0.01, cross_layer=False)
    seen = 0
    for seed in range(80):
        W = _weight(seed, out=2)
        statistics = _statistics(_inputs(seed + 100))
        (solution,) = quantize_together(W, [2], None, statistics, None, options)
        if solution.clipped == 0:
            assert solution.babai_bound is not None
            assert 0 < solution.relative_error <= solution.babai_bound * 1.01
            seen += 1
    assert seen > 4


def test_what_makes_good_an_earlier_loss_has_no_babai_bound():
    """The error is against the weight as it was, which is no longer what is rounded."""
    W, X, fresh = _weight(), _inputs(1, 2000), _inputs(2, 500)
    options = QuantizationOptions(8, 8)
    train, held_out = (_statistics(each, each @ (0.9 * torch.eye(32))) for each in (X, fresh))
    (solution,) = quantize_together(W, [12], None, train, held_out, options)
    assert solution.alpha > 0
    assert solution.relative_error > 1e-4
    assert solution.babai_bound is None
