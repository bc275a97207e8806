"""The parts of benchmarks/distillation that a wrong factor would spoil silently."""

import json

from transformers import LlamaForCausalLM

from benchmarks.distillation.results import PAGE, RESULTS, summarise
from benchmarks.distillation.steps import multiplications
from benchmarks.places import ROOT


def test_multiplications_count_every_matrix_and_the_tied_head_once(tiny: LlamaForCausalLM) -> None:
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24  # q, k and v, o; heads of 4
    expected = 2 * (attention + 3 * 24 * 40) + 24 * 50
    assert multiplications(tiny) == expected


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == summarise(json.loads(RESULTS.read_text()))


def test_the_readme_shows_the_measured_step() -> None:
    claims = json.loads(RESULTS.read_text())["claims"]
    ratios = [claim for claim in claims if claim["claim"].endswith("student of 10 layers")]
    assert len(ratios) == 1
    measured = f"{ratios[0]['measured']:.2f} times as long as from the cache"
    assert measured in (ROOT / "README.md").read_text()
