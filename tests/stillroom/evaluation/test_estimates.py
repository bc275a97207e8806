"""Standard errors against simulation and closed form."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import MismatchError
from stillroom.evaluation.estimates import (
    Estimate,
    Quality,
    exact,
    paired_difference,
    paired_estimate,
    paired_ratio,
    student_quantile_95,
)


def quality(counts, nats, kl=None, agreed=None, correct=None) -> Quality:
    zeros = tuple(0 for _ in counts)
    return Quality(
        task="causal_lm",
        documents=tuple(range(len(counts))),
        counts=tuple(counts),
        nats=tuple(nats),
        kl_nats=tuple(kl or zeros),
        agreed=tuple(agreed or zeros),
        correct=tuple(correct or zeros),
    )


def simulate(draw: random.Random, clusters: int) -> Quality:
    counts = [draw.randint(20, 200) for _ in range(clusters)]
    return quality(counts, [n * draw.gauss(3.0, 0.5) for n in counts])


def test_equal_clusters_give_the_closed_form():
    means = [1.0, 2.0, 4.0, 5.5, 3.0]
    measured = quality([10] * 5, [10 * mean for mean in means]).estimate("nats")
    assert measured.value == pytest.approx(statistics.mean(means))
    assert measured.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(5))
    assert measured.samples == 5


def test_clustered_error_matches_a_bootstrap():
    draw = random.Random(1)
    one = simulate(draw, 60)
    resampled = []
    for _ in range(2000):
        chosen = draw.choices(range(60), k=60)
        resampled.append(sum(one.nats[c] for c in chosen) / sum(one.counts[c] for c in chosen))
    assert one.estimate("nats").standard_error == pytest.approx(
        statistics.stdev(resampled), rel=0.1
    )


def test_clustered_error_matches_the_spread_over_repeated_data():
    draw = random.Random(2)
    estimates = [simulate(draw, 40).estimate("nats") for _ in range(800)]
    spread = statistics.stdev(estimate.value for estimate in estimates)
    assert statistics.mean(e.standard_error for e in estimates) == pytest.approx(spread, rel=0.1)


def test_perplexity_is_the_exponential_with_its_derivative():
    one = simulate(random.Random(3), 30)
    nats, perplexity = one.estimate("nats"), one.estimate("perplexity")
    assert perplexity.value == pytest.approx(math.exp(nats.value))
    assert perplexity.standard_error == pytest.approx(perplexity.value * nats.standard_error)


def test_one_document_gives_no_standard_error():
    one = quality([5], [10.0])
    assert one.estimate("nats") == Estimate(2.0, None, 1)
    assert one.estimate("nats").upper() is None
    assert paired_difference(one, one, "nats") == (0.0, None)


def test_pairing_removes_what_documents_share():
    draw = random.Random(4)
    counts = [draw.randint(50, 150) for _ in range(50)]
    shared = [draw.gauss(3.0, 0.5) for _ in counts]
    a = quality(
        counts, [n * (s + draw.gauss(0.2, 0.02)) for n, s in zip(counts, shared, strict=True)]
    )
    b = quality(
        counts, [n * (s + draw.gauss(0.0, 0.02)) for n, s in zip(counts, shared, strict=True)]
    )
    difference, error = paired_difference(a, b, "nats")
    apart = math.hypot(a.estimate("nats").standard_error, b.estimate("nats").standard_error)
    assert error < apart / 5
    assert abs(difference - 0.2) < 4 * error


def test_perplexity_ratio_is_the_exponential_of_the_difference():
    draw = random.Random(5)
    a = simulate(draw, 25)
    b = quality(a.counts, [n * draw.gauss(2.8, 0.4) for n in a.counts])
    difference, ratio = paired_estimate(a, b, "nats"), paired_ratio(a, b, "perplexity")
    assert ratio.value == pytest.approx(math.exp(difference.value))
    assert ratio.standard_error == pytest.approx(ratio.value * difference.standard_error)


def test_a_model_against_itself_differs_by_exactly_nothing():
    one = simulate(random.Random(6), 10)
    assert paired_difference(one, one, "perplexity") == (0.0, 0.0)


def test_a_ratio_to_nothing_is_not_finite():
    a, b = quality([2, 2], [1, 1], correct=[1, 1]), quality([2, 2], [1, 1])
    assert paired_ratio(a, b, "accuracy").value == math.inf
    assert math.isnan(paired_ratio(b, b, "accuracy").value)


def test_other_data_is_refused():
    with pytest.raises(MismatchError, match="only on the same data"):
        paired_difference(quality([5, 5], [1, 1]), quality([5, 6], [1, 1]), "nats")


def test_student_quantiles_are_the_tabulated_ones():
    table = {1: 6.3138, 2: 2.9200, 3: 2.3534, 5: 2.0150, 9: 1.8331, 30: 1.6973, 1000: 1.6464}
    for freedom, quantile in table.items():
        assert student_quantile_95(freedom) == pytest.approx(quantile, rel=1e-3)
    assert student_quantile_95(0) == math.inf


def test_bounds_of_an_estimate():
    estimate = Estimate(10.0, 2.0, 6)
    assert estimate.upper() == pytest.approx(10 + 2.015 * 2, rel=1e-3)
    assert estimate.lower() == pytest.approx(10 - 2.015 * 2, rel=1e-3)
    assert exact(3).upper() == exact(3).lower() == 3


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0, 1e9), st.floats(0, 1e9)),
        min_size=1,
        max_size=8,
    )
)
def test_json_keeps_every_bit(rows):
    counts, nats, kl = zip(*rows, strict=True)
    one = quality(counts, nats, kl)
    assert Quality.from_json(one.to_json()) == one
