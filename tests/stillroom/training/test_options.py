import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import RecipeError
from stillroom.training.batches import RowOrder
from stillroom.training.options import TrainingOptions, learning_rate_at, total_steps

OPTIONS = TrainingOptions(learning_rate=1.0, warmup_fraction=0.2)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_learning_rate_rises_then_never_rises_again_and_stays_positive(steps, fraction, schedule):
    options = replace(OPTIONS, warmup_fraction=fraction, schedule=schedule)
    rates = [learning_rate_at(step, steps, options) for step in range(1, steps + 1)]
    peak = max(math.ceil(fraction * steps), 1) - 1
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if fraction > 0:
        assert rates[peak] == 1


def test_linear_schedule_is_a_line():
    options = replace(OPTIONS, warmup_fraction=0, schedule="linear")
    rates = [learning_rate_at(step, 4, options) for step in range(1, 5)]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 20))
def test_order_of_rows_depends_on_the_position_alone(rows, start, count):
    whole = RowOrder(rows, seed=3).rows_at(0, start + count)
    assert torch.equal(RowOrder(rows, seed=3).rows_at(start, count), whole[start:])
    for epoch in range(len(whole) // rows):
        part = whole[epoch * rows : (epoch + 1) * rows]
        assert sorted(part.tolist()) == list(range(rows))


def test_order_differs_between_epochs_and_seeds():
    order = RowOrder(50, seed=0).rows_at(0, 100)
    assert not torch.equal(order[:50], order[50:])
    assert not torch.equal(order, RowOrder(50, seed=1).rows_at(0, 100))


def test_epochs_become_steps_rounded_up():
    options = replace(OPTIONS, epochs=1.5, batch_rows=4, gradient_accumulation=2)
    assert total_steps(options, rows=17) == 4
    assert total_steps(replace(options, steps=7), rows=17) == 7


def test_no_step_is_refused():
    with pytest.raises(RecipeError, match="at least one step, got 0"):
        total_steps(replace(OPTIONS, steps=0), rows=5)


def test_bucketed_rows_come_once_an_epoch_beside_rows_of_their_length():
    lengths = torch.randint(1, 100, (331,), generator=torch.Generator().manual_seed(0))
    order = RowOrder(331, 3, batch_rows=8, lengths=lengths)
    rows = order.rows_at(0, 3 * 331)
    for epoch in rows.split(331):
        assert sorted(epoch.tolist()) == list(range(331))
    assert not torch.equal(rows[:331], rows[331:662])

    def padded(rows):
        return sum(8 * lengths[batch].max() for batch in rows[: len(rows) // 8 * 8].split(8))

    plain = RowOrder(331, 3).rows_at(0, 3 * 331)
    assert padded(rows) < 1.1 * lengths[rows].sum()
    assert padded(plain) > 1.5 * lengths[plain].sum()
    # Long and short batches are mixed, and any position can be asked for.
    means = lengths[rows[:320]].float().reshape(-1, 8).mean(1)
    assert (means[:20].mean() / means[20:].mean() - 1).abs() < 0.5
    again = RowOrder(331, 3, batch_rows=8, lengths=lengths)
    assert torch.equal(again.rows_at(500, 20), rows[500:520])


def test_fewer_rows_than_a_batch_are_bucketed_too():
    order = RowOrder(3, 0, batch_rows=8, lengths=torch.tensor([1, 2, 3]))
    assert sorted(order.rows_at(0, 9).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
