"""The loss against a few words a position: autograd's values and gradients, in less memory."""

import pytest
import torch

from stillroom.distillation import chosen_words
from stillroom.distillation.chosen_words import cross_entropy_of_words


def inputs(positions=7, vocab=50, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, positions, vocab, generator=generator)
    ids = torch.randint(0, vocab, (2, positions, k), generator=generator)
    ids[..., 1] = ids[..., 0]  # a word drawn twice
    weights = torch.rand(2, positions, k, generator=generator)
    return logits, ids, weights


def plainly(logits, ids, weights, temperature):
    log_q = torch.log_softmax(logits / temperature, -1)
    return -(weights * log_q.gather(-1, ids)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 120, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_autograds(monkeypatch, temperature, chunk, dtype):
    monkeypatch.setattr(chosen_words, "CHUNK", chunk)
    logits, ids, weights = inputs()
    scale = torch.rand(2, 7, dtype=dtype)
    one, other = (logits.to(dtype).requires_grad_() for _ in range(2))
    found = cross_entropy_of_words(one, ids, weights, temperature)
    expected = plainly(other, ids, weights, temperature)
    torch.testing.assert_close(found, expected)
    (found * scale).sum().backward()
    (expected * scale).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16_logits_are_summed_in_float32(temperature):
    logits, ids, weights = inputs(vocab=4096)
    rough = logits.bfloat16().requires_grad_()
    exact = rough.detach().float().requires_grad_()
    found = cross_entropy_of_words(rough, ids, weights, temperature)
    expected = plainly(exact, ids, weights, temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    assert rough.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rough.grad, exact.grad.bfloat16())


def test_positions_without_weight_get_nothing_whatever_their_logits():
    logits, ids, weights = inputs()
    logits[0, 3] = float("nan")
    logits[1, 2] = float("inf")
    weights[0, 3] = weights[1, 2] = 0.0
    logits.requires_grad_()
    found = cross_entropy_of_words(logits, ids, weights)
    found.sum().backward()
    assert found[0, 3] == found[1, 2] == 0
    assert torch.isfinite(found).all()
    assert (logits.grad[0, 3] == 0).all()
    assert (logits.grad[1, 2] == 0).all()
    assert torch.isfinite(logits.grad).all()


def test_no_words_and_no_positions():
    logits, ids, weights = inputs()
    assert (cross_entropy_of_words(logits, ids[..., :0], weights[..., :0]) == 0).all()
    empty = cross_entropy_of_words(logits[:, :0], ids[:, :0], weights[:, :0])
    assert empty.shape == (2, 0)


def test_no_tensor_as_large_as_the_logits_is_kept_beside_them():
    logits, ids, weights = inputs(vocab=4096)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy_of_words(logits, ids, weights, 2.0)
    large = [each for each in kept if each.numel() >= logits.numel()]
    assert [each.data_ptr() for each in large] == [logits.data_ptr()]
