import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.quantization.grid import find_grid


def _values(seed: int, rows: int = 5, columns: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_a_full_range_grid_errs_by_at_most_half_a_step(seed, bits, symmetric):
    values = _values(seed)
    grid = find_grid(values, bits, symmetric)
    error = (grid.dequantize(grid.quantize(values)) - values).abs()
    # The end of a symmetric grid, or a rounded zero point, can cost another half step.
    assert (error <= grid.scale * 1.01).all()
    inside = ~grid.clipped(values)
    assert (error[inside] <= (0.51 * grid.scale).expand_as(error)[inside]).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_scales_are_fp16_and_zero_points_fit_the_checkpoint(seed, bits, symmetric):
    grid = find_grid(_values(seed), bits, symmetric, torch.ones(16))
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert grid.zero.min() >= 1
    assert grid.zero.max() <= 2**bits - 1
    if symmetric:
        assert (grid.zero == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_what_trying_every_share_by_hand_finds(bits, symmetric):
    values = _values(1)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(2))
    whole = find_grid(values, bits, symmetric)
    found = find_grid(values, bits, symmetric, importance)
    by_hand = torch.full((len(values),), torch.inf)
    for step in range(41):
        scale = (whole.scale * (1 - 0.6 * step / 40)).half().float()
        integers = ((values / scale).round() + whole.zero).clamp(0, 2**bits - 1)
        error = (integers - whole.zero) * scale - values
        by_hand = torch.minimum(by_hand, error.square() @ importance)
    error = found.dequantize(found.quantize(values)) - values
    losses = error.square() @ importance
    assert float(losses.sum()) < float(by_hand.sum())


def test_the_search_is_the_same_in_pieces_and_at_once(monkeypatch):
    values, importance = _values(3, rows=50), torch.ones(16)
    at_once = find_grid(values, 3, False, importance)
    monkeypatch.setattr("stillroom.quantization.grid.WEIGHTS_AT_ONCE", 64)
    assert torch.equal(find_grid(values, 3, False, importance).scale, at_once.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-7, 7e4])
def test_constant_rows_stay_finite_and_close(value, symmetric):
    values = torch.full((1, 4), value)
    grid = find_grid(values, 4, symmetric, torch.ones(4))
    restored = grid.dequantize(grid.quantize(values))
    assert torch.allclose(restored, values, rtol=0.15, atol=1e-7)
    assert 1 <= grid.zero.item() <= 15


def test_a_row_of_zeros_is_exact_beside_others():
    values = torch.stack([torch.zeros(8), torch.linspace(-1, 1, 8)])
    grid = find_grid(values, 4, False, torch.ones(8))
    assert torch.equal(grid.dequantize(grid.quantize(values))[0], torch.zeros(8))
