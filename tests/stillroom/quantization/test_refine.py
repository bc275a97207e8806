import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.quantization.gptq import gptq
from stillroom.quantization.hessian import damp
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.refine import descend, refine, refit_scales, row_losses
from stillroom.quantization.rounding import round_to_nearest
from stillroom.quantization.weight import QuantizedWeight


def _layer(seed, out=6, columns=32, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    X = (
        torch.randn(tokens, columns, generator=generator) * torch.linspace(1, 0.1, columns)
    ) @ mixing
    return W, damp(2 * X.T @ X / tokens, 0.01)


OPTIONS = QuantizationOptions(3, 8)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([8, 32])
)
def test_no_step_raises_the_loss_of_any_row(seed, bits, symmetric, group_size):
    W, H = _layer(seed)
    start = gptq(W, H, QuantizationOptions(bits, group_size, symmetric)).weight
    losses = row_losses(W, H, start)
    slack = 1e-4 * losses + 1e-6 * ((W @ H) * W).sum(1)
    moved = descend(W, H, start)
    assert (row_losses(W, H, moved) <= losses + slack).all()
    fitted = refit_scales(W, H, moved)
    assert (row_losses(W, H, fitted) <= row_losses(W, H, moved) + slack).all()
    assert torch.equal(fitted.integers, moved.integers)
    assert torch.equal(moved.scales, start.scales)


@pytest.mark.parametrize("block_size", [1, 5, 8, 128])
def test_a_sweep_is_what_moving_one_column_after_another_by_hand_gives(block_size):
    W, H = _layer(1)
    start = round_to_nearest(W, OPTIONS).weight
    Q, grid = start.dequantize().double(), (start.scales.double(), start.zeros.double())
    for j in range(W.shape[1]):
        scale, zero = (each[:, j // 8] for each in grid)
        others = H[:, j].double().clone()
        others[j] = 0
        best = W[:, j].double() + (W.double() - Q) @ others / float(H[j, j])
        q = (best / scale).round().add(zero).clamp(0, 7)
        Q[:, j] = (q - zero) * scale
    found = descend(W, H, start, block_size).dequantize()
    assert torch.allclose(found.double(), Q, atol=1e-6)


def test_refitted_scales_are_those_of_least_squares():
    W, H = _layer(2, out=3)
    start = round_to_nearest(W, OPTIONS).weight
    found = refit_scales(W, H, start)
    root = torch.linalg.cholesky(H.double())  # |root^T x|^2 = x H x
    for row in range(3):
        Z = torch.zeros(32, 4, dtype=torch.float64)
        for g in range(4):
            part = slice(8 * g, 8 * g + 8)
            Z[part, g] = start.integers[row, part].double() - start.zeros[row, g].double()
        best = torch.linalg.lstsq(root.T @ Z, root.T @ W[row].double()).solution
        assert torch.allclose(found.scales[row].double(), best, rtol=2e-3)


def test_uncorrelated_inputs_leave_rounding_as_it_is():
    W = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    start = round_to_nearest(W, OPTIONS).weight
    assert torch.equal(descend(W, torch.eye(16), start).integers, start.integers)


def test_a_group_of_zero_points_keeps_its_scale():
    W, H = _layer(4)
    W[:, :8] = 0
    start = round_to_nearest(W, OPTIONS).weight
    found = refit_scales(W, H, start)
    assert torch.equal(found.scales[:, 0], start.scales[:, 0])
    assert torch.isfinite(found.scales).all()


def test_rounds_go_on_lowering_the_loss():
    W, H = _layer(5)
    start = gptq(W, H, OPTIONS).weight
    losses = [float(row_losses(W, H, refine(W, H, start, rounds)).sum()) for rounds in (0, 1, 3)]
    assert losses[0] > losses[1] >= losses[2]
    same = refine(W, H, start, 0)
    assert isinstance(same, QuantizedWeight)
    assert torch.equal(same.integers, start.integers)
