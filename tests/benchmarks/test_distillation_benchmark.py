"""The parts of benchmarks/distillation that a wrong factor would spoil silently."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from benchmarks.distillation import mixture, sst2
from benchmarks.distillation.results import PAGE, RESULTS, summarise
from benchmarks.distillation.steps import multiplications
from benchmarks.distillation.targets import HEADS, pairs_within
from benchmarks.phrases import Example
from benchmarks.places import ROOT
from benchmarks.results import claims_of
from stillroom.distillation.cache_files import sparse_bytes
from stillroom.distillation.teacher_cache import CacheOptions


def test_multiplications_count_every_matrix_and_the_tied_head_once(tiny: LlamaForCausalLM) -> None:
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24  # q, k and v, o; heads of 4
    expected = 2 * (attention + 3 * 24 * 40) + 24 * 50
    assert multiplications(tiny) == expected


def test_every_pair_uses_the_bytes_of_the_default_and_it_is_one_of_them() -> None:
    default = CacheOptions()
    budget = sparse_bytes(default.head, default.draws, 49_152)
    pairs = pairs_within(budget, 49_152)
    assert [head for head, _ in pairs] == list(HEADS)
    assert (default.head, default.draws) in pairs
    for head, draws in pairs:
        assert sparse_bytes(head, draws, 49_152) <= budget < sparse_bytes(head, draws + 1, 49_152)


@pytest.mark.parametrize(("sparse", "share"), [(1.0, 0.5), (2.5, None)])
def test_a_share_needs_a_gain_and_fewer_nats_are_better(
    sparse: float, share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "measure_path", lambda name: tmp_path / name)
    reached = {"the mixture": sparse, mixture.TWIN: 2.0, mixture.DISTILLED: 1.9}
    reached |= {mixture.STARTED: 1.5, mixture.MIXED: 1.6}
    mixture.keep_mixture({name: [nats] for name, nats in reached.items()})
    kept = json.loads((tmp_path / "mixture").read_text())
    shares = {row["model"]: row["share_of_gain"] for row in kept["rows"]}
    assert shares[mixture.STARTED] == share
    assert [claim["holds"] for claim in kept["claims"]] == [True, False]


def test_the_student_must_beat_the_better_of_those_without_a_teacher() -> None:
    def answers(right: int) -> list[list[bool]]:
        return [[place < right for place in range(200)]] * 2

    right = {sst2.TEACHER: answers(180), sst2.OURS.title: answers(178)}
    rivals = [rival.title for rival in sst2.ALONE]
    test = [Example("", 1, place // 2) for place in range(200)]
    for better, worse in (rivals, reversed(rivals)):
        found = right | {better: answers(179), worse: answers(100)}
        kept, speed, gain = sst2.claims_of(found, test, speed=2.0)
        assert kept.measured == pytest.approx(178 / 180)
        assert speed.measured == 2.0
        # Half a point lost, and no gain over the worse one makes up for it.
        assert gain.measured < -0.5
        assert not gain.holds


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == summarise(json.loads(RESULTS.read_text()))


def test_the_readme_shows_the_measured_step() -> None:
    claims = claims_of(json.loads(RESULTS.read_text())["measures"])
    ratios = [claim for claim in claims if claim.claim.endswith("student of 10 layers")]
    assert len(ratios) == 1
    measured = f"{ratios[0].measured:.2f} times as long as from the cache"
    assert measured in (ROOT / "README.md").read_text()
