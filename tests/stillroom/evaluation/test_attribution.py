"""Loss steps that add up, and verdicts that noise cannot carry."""

import random

import pytest

from stillroom.errors import MismatchError
from stillroom.evaluation.attribution import attribute_loss, judge
from tests.stillroom.evaluation.test_estimates import quality

DRAW = random.Random(0)
COUNTS = [DRAW.randint(50, 150) for _ in range(20)]
SHARED = [DRAW.gauss(3.0, 0.5) for _ in COUNTS]


def model(added, noise=0.01, correct=0.5):
    draw = random.Random(str((added, noise)))
    nats = [n * (s + added + draw.gauss(0, noise)) for n, s in zip(COUNTS, SHARED, strict=True)]
    return quality(COUNTS, nats, correct=[round(correct * n) for n in COUNTS])


def test_steps_add_up_to_the_whole():
    chain = [("teacher", model(0)), ("student", model(0.4)), ("quantized", model(0.5))]
    steps = attribute_loss(chain)
    assert [(s.previous, s.name) for s in steps] == [
        ("teacher", "student"),
        ("student", "quantized"),
    ]
    whole = chain[-1][1].estimate("nats").value - chain[0][1].estimate("nats").value
    assert sum(s.nats.value for s in steps) == pytest.approx(whole)
    assert sum(s.share for s in steps) == pytest.approx(1)
    assert steps[0].share == pytest.approx(0.8, abs=0.05)
    assert steps[1].nats.standard_error < 0.01


def test_shares_of_noise_are_not_given():
    steps = attribute_loss([("a", model(0, 0.3)), ("b", model(0.001, 0.3))])
    assert steps[0].share is None
    better = attribute_loss([("a", model(0.5)), ("b", model(0))])
    assert better[0].share is None
    assert better[0].nats.value < 0


def test_a_chain_of_one_has_no_steps():
    assert attribute_loss([("teacher", model(0))]) == ()


def test_other_data_is_refused():
    with pytest.raises(MismatchError):
        attribute_loss([("a", model(0)), ("b", quality([1, 2], [1, 2]))])


def test_a_clear_gain_holds():
    verdict = judge("a beats b", model(0.1), model(0.2))
    assert verdict.holds
    assert verdict.gain.value == pytest.approx(0.1, abs=0.02)
    assert verdict.sentence.startswith("a beats b: yes, by 0.")
    assert verdict.sentence.endswith("nats")


def test_a_loss_does_not_hold():
    verdict = judge("a beats b", model(0.2), model(0.1))
    assert not verdict.holds
    assert verdict.sentence.startswith("a beats b: no, by -0.")


def test_noise_is_not_shown():
    same = model(0)
    nats = list(same.nats)
    nats[0] -= 1.0
    verdict = judge("a beats b", quality(COUNTS, nats), same)
    assert verdict.gain.value > 0
    assert not verdict.holds
    assert "not shown (within the noise)" in verdict.sentence


def test_one_document_shows_nothing():
    verdict = judge("a beats b", quality([5], [1]), quality([5], [9]))
    assert not verdict.holds
    assert "one document" in verdict.sentence


def test_more_accuracy_is_better_and_more_perplexity_is_worse():
    a, b = model(0.1, correct=0.7), model(0.3, correct=0.5)
    assert judge("a", a, b, "accuracy").gain.value == pytest.approx(0.2, abs=0.01)
    assert judge("a", a, b, "perplexity").holds
    assert not judge("b", b, a, "perplexity").holds
