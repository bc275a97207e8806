import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stillroom.distillation.losses import (
    DenseTargets,
    SoftTargets,
    dense_cross_entropy,
    dense_kl,
    hard_cross_entropy,
    hidden_cosine,
    jensen_shannon,
    mixed_loss,
    next_labels,
    reverse_kl,
    soft_cross_entropy,
    soft_kl,
    soft_loss,
)
from stillroom.errors import MismatchError, RecipeError

ROWS, LENGTH, VOCAB = 2, 5, 11


def case(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(ROWS, LENGTH, VOCAB, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(ROWS, LENGTH, VOCAB, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.4] = -100
    labels[0, 0] = 3
    return student, teacher, labels


def everything(teacher, temperature):
    """The teacher's whole distribution written as soft targets, in reversed order."""
    p = torch.softmax(teacher / temperature, -1).flip(-1)
    ids = torch.arange(VOCAB - 1, -1, -1).expand(ROWS, LENGTH, VOCAB)
    return SoftTargets(ids, p, torch.special.entr(p).sum(-1))


def test_next_labels_move_one_to_the_left():
    assert next_labels(torch.tensor([[1, -100, 3]])).tolist() == [[-100, 3, -100]]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_hard_cross_entropy_equals_torch(seed):
    student, _, labels = case(seed)
    expected = functional.cross_entropy(student.flatten(0, 1), labels.flatten())
    assert hard_cross_entropy(student, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    flat = hard_cross_entropy(student[:, 0], labels[:, 0])
    if (labels[:, 0] >= 0).any():
        expected = functional.cross_entropy(student[:, 0], labels[:, 0])
        assert flat.item() == pytest.approx(expected.item(), rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_dense_kl_equals_torch(seed, temperature):
    student, teacher, labels = case(seed)
    kept = labels != -100
    expected = temperature**2 * functional.kl_div(
        torch.log_softmax(student[kept] / temperature, -1),
        torch.log_softmax(teacher[kept] / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    assert dense_kl(student, teacher, labels, temperature).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_soft_kl_on_the_whole_distribution_equals_the_dense_one(seed, temperature):
    student, teacher, labels = case(seed)
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    soft = soft_kl(one, everything(teacher, temperature), labels, temperature)
    dense = dense_kl(other, teacher, labels, temperature)
    assert soft.item() == pytest.approx(dense.item(), rel=1e-4, abs=1e-5)
    soft.backward()
    dense.backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.5, 8))
def test_divergences_equal_their_definitions(seed, temperature):
    student, teacher, labels = case(seed)
    kept = labels != -100
    q = torch.softmax(student[kept] / temperature, -1)  # (positions, vocab)
    p = torch.softmax(teacher[kept] / temperature, -1)
    m = (p + q) / 2

    def mean_kl(one, other):
        return (one * (one / other).log()).sum(-1).mean()

    expected = {
        reverse_kl: mean_kl(q, p),
        jensen_shannon: (mean_kl(p, m) + mean_kl(q, m)) / 2,
        dense_cross_entropy: -(p * q.log()).sum(-1).mean(),
    }
    for loss, value in expected.items():
        found = loss(student, teacher, labels, temperature).item()
        assert found == pytest.approx(temperature**2 * value.item(), rel=1e-4, abs=1e-6)


def test_jensen_shannon_is_symmetric_and_never_above_log_2():
    student, teacher, labels = case(4, scale=60.0)
    one = jensen_shannon(student, teacher, labels)
    assert one.item() == pytest.approx(jensen_shannon(teacher, student, labels).item(), rel=1e-6)
    assert 0.5 < one.item() <= math.log(2) + 1e-6


@pytest.mark.parametrize(
    ("divergence", "loss"),
    [
        ("kl", dense_kl),
        ("cross_entropy", dense_cross_entropy),
        ("reverse_kl", reverse_kl),
        ("jensen_shannon", jensen_shannon),
    ],
)
def test_each_divergence_is_named(divergence, loss):
    student, teacher, labels = case(5)
    expected = loss(student, teacher, labels, 2.0).item()
    found = soft_loss(student, DenseTargets(teacher), labels, divergence, 2.0).item()
    assert found == pytest.approx(expected)
    sparse = everything(teacher, 2.0)
    if divergence in ("kl", "cross_entropy"):
        found = soft_loss(student, sparse, labels, divergence, 2.0).item()
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        with pytest.raises(RecipeError, match=f"{divergence} is not linear"):
            soft_loss(student, sparse, labels, divergence, 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [dense_kl, dense_cross_entropy, reverse_kl, jensen_shannon])
def test_half_logits_are_compared_as_exactly_as_float32_ones(loss, dtype):
    student, teacher, labels = (
        each.to(dtype) if each.is_floating_point() else each for each in case(6)
    )
    for temperature in (1.0, 2.0):
        one, other = student.clone().requires_grad_(), student.float().requires_grad_()
        found = loss(one, teacher.float(), labels, temperature)
        expected = loss(other, teacher.float(), labels, temperature)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
        found.backward()
        expected.backward()
        torch.testing.assert_close(one.grad, other.grad.to(dtype))
    if loss is not dense_cross_entropy:
        assert loss(student, student.float(), labels).item() == pytest.approx(0, abs=1e-6)


def test_cosine_of_hidden_states():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    student = torch.tensor([[[3.0, 0.0], [5.0, 0.0], [-1.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    # Parallel, orthogonal, and one that is padding.
    assert hidden_cosine(student, teacher, mask).item() == pytest.approx(0.5)
    with pytest.raises(MismatchError, match="2 came, the teacher has 3"):
        hidden_cosine(student, torch.zeros(1, 3, 3), mask)


def test_kl_of_equal_logits_is_zero():
    student, _, labels = case(0)
    assert dense_kl(student, student, labels, 2.0).item() == pytest.approx(0, abs=1e-12)
    soft = soft_kl(student, everything(student, 2.0), labels, 2.0)
    assert soft.item() == pytest.approx(0, abs=1e-6)


def test_entries_without_probability_count_for_nothing():
    student, teacher, labels = case(1)
    targets = everything(teacher, 1.0)
    padded = SoftTargets(
        torch.cat([targets.ids, torch.zeros(ROWS, LENGTH, 2, dtype=torch.long)], -1),
        torch.cat([targets.probabilities, torch.zeros(ROWS, LENGTH, 2)], -1),
        targets.entropy,
    )
    assert torch.equal(
        soft_cross_entropy(student, padded, labels), soft_cross_entropy(student, targets, labels)
    )


def test_a_word_named_twice_has_the_sum_of_its_probabilities():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    labels = torch.tensor([[0]])
    twice = SoftTargets(
        torch.tensor([[[1, 1, 2]]]), torch.tensor([[[0.25, 0.25, 0.5]]]), torch.zeros(1, 1)
    )
    once = SoftTargets(torch.tensor([[[1, 2]]]), torch.tensor([[[0.5, 0.5]]]), torch.zeros(1, 1))
    assert soft_cross_entropy(logits, twice, labels).item() == pytest.approx(
        soft_cross_entropy(logits, once, labels).item()
    )


def test_masked_positions_change_nothing():
    student, teacher, labels = case(2)
    changed = student.clone()
    changed[labels == -100] = 50.0
    for loss in (
        lambda z: hard_cross_entropy(z, labels),
        lambda z: dense_kl(z, teacher, labels, 2.0),
        lambda z: soft_kl(z, everything(teacher, 2.0), labels, 2.0),
    ):
        assert torch.equal(loss(student), loss(changed))
    nothing = torch.full_like(labels, -100)
    assert hard_cross_entropy(student, nothing).item() == 0


def test_mix_is_the_weighted_sum_and_names_its_parts():
    student, teacher, labels = case(3)
    loss, figures = mixed_loss(
        student, labels, DenseTargets(teacher), soft_weight=0.25, hard_weight=0.75, temperature=2.0
    )
    kl = dense_kl(student, teacher, labels, 2.0).item()
    hard = hard_cross_entropy(student, labels).item()
    assert loss.item() == pytest.approx(0.25 * kl + 0.75 * hard, rel=1e-6)
    assert figures == pytest.approx({"kl_nats": kl / 4, "cross_entropy_nats": hard}, rel=1e-6)
    _, figures = mixed_loss(
        student, labels, None, soft_weight=1.0, hard_weight=1.0, temperature=2.0
    )
    assert list(figures) == ["cross_entropy_nats"]
