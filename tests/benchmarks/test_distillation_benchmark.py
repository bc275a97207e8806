"""The parts of benchmarks/distillation that a wrong factor would spoil silently."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.distillation.results import PAGE, RESULTS, summarise
from benchmarks.distillation.steps import multiplications
from benchmarks.places import ROOT


def test_multiplications_count_every_matrix_and_the_tied_head_once() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24  # q, k and v, o; heads of 4
    expected = 2 * (attention + 3 * 24 * 40) + 24 * 50
    assert multiplications(LlamaForCausalLM(config)) == expected


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == summarise(json.loads(RESULTS.read_text()))


def test_the_readme_shows_the_measured_step() -> None:
    claims = json.loads(RESULTS.read_text())["claims"]
    ratios = [claim for claim in claims if claim["claim"].endswith("student of 10 layers")]
    assert len(ratios) == 1
    measured = f"{ratios[0]['measured']:.2f} times"
    assert measured in (ROOT / "README.md").read_text()
