import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.distillation.sampling import draw, round_to_half, sparsify


def distribution(seed, vocab, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(scale * torch.randn(1, vocab, generator=generator), -1)


def as_dense(kept, vocab):
    """Return the targets (positions, vocab) that a sparse distribution stands for."""
    dense = torch.zeros(len(kept.entropy), vocab)
    dense.scatter_add_(1, kept.head_ids, kept.head_probabilities)
    draws = kept.tail_ids.shape[1]
    if draws:
        each = (kept.tail_mass / draws).unsqueeze(-1).expand(kept.tail_ids.shape)
        dense.scatter_add_(1, kept.tail_ids, each)
    return dense


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(0, 6), st.integers(1, 6))
def test_expectation_is_the_distribution_in_closed_form(seed, vocab, head, draws):
    # The mean over u of a function of one uniform number, by the midpoint rule: each word's share
    # is off by at most one of the points at either end of its interval.
    head = min(head, vocab - 1)
    p = distribution(seed, vocab)
    points = 4000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    uniforms = grid.unsqueeze(-1).expand(points, draws)
    kept = sparsify(p.expand(points, vocab), head, uniforms)
    mean = as_dense(kept, vocab).double().mean(0)
    assert (mean - p[0]).abs().max() < 3 / points
    assert kept.tail_mass[0].item() == pytest.approx(
        1 - kept.head_probabilities[0].sum().item(), abs=1e-5
    )


def test_targets_sum_to_one_and_the_head_is_exact():
    p = torch.cat([distribution(seed, 50) for seed in range(20)])
    uniforms = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    kept = sparsify(p, 4, uniforms)
    dense = as_dense(kept, 50)
    torch.testing.assert_close(dense.sum(-1), torch.ones(20))
    best = p.topk(4).indices
    torch.testing.assert_close(dense.gather(1, best), p.gather(1, best))
    assert not (kept.tail_ids.unsqueeze(-1) == best.unsqueeze(1)).any()
    torch.testing.assert_close(kept.entropy, -(p * p.log()).sum(-1))


def test_stratified_draws_vary_less_than_independent_ones():
    p = distribution(7, 30)
    generator = torch.Generator().manual_seed(1)
    trials, draws = 4000, 8
    uniforms = torch.rand(trials, draws, generator=generator, dtype=torch.float64)
    kept = sparsify(p.expand(trials, 30), 0, uniforms)
    # The variance of M independent draws' share of a word is p(1 − p) / M.
    variance = as_dense(kept, 30).var(0)
    independent = (p * (1 - p) / draws)[0]
    assert variance.sum() < 0.8 * independent.sum()


def test_words_without_probability_are_never_drawn():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).cumsum(-1)
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw(weights, edges).tolist() == [[1, 3]]
    single = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    assert draw(single, edges).tolist() == [[0, 0]]


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, width=32))
def test_rounding_to_half_keeps_the_mean(value):
    points = 4000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    rounded = round_to_half(torch.full((points,), value), grid).double()
    spacing = max(value * 2**-10, 2**-24)  # of the neighbours: half of it at least, at most all
    assert (rounded.max() - rounded.min()).item() <= spacing
    # The grid decides to half a point how many are rounded up.
    assert abs(rounded.mean().item() - value) <= spacing / (2 * points) + 1e-12
    exact = torch.tensor([value]).half().float()
    assert torch.equal(round_to_half(exact, torch.tensor([0.0])).float(), exact)
