"""The parts of benchmarks/quantization that a wrong sign or factor would spoil silently."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.comparison import paired_difference, paired_ratio
from benchmarks.phrases import clustered_loss, split_by_sentence
from benchmarks.places import ROOT
from benchmarks.quantization.cells import Cell, table_cells
from benchmarks.quantization.claims import quality_claims, speed_claims
from benchmarks.quantization.evaluate import Evaluator
from benchmarks.quantization.floor import SMOLLM2, BlockShape, floor_flops
from benchmarks.quantization.measures import linear_share
from benchmarks.quantization.rescaling import rescale_channels
from benchmarks.quantization.results import PAGE, RESULTS
from benchmarks.quantization.rows import payload_bytes
from benchmarks.quantization.summary import summarise
from benchmarks.quantization.work import Rows


def test_rescaling_keeps_the_function_and_changes_every_linear(tiny: LlamaForCausalLM) -> None:
    ids = torch.arange(32)[None]
    before = {name: each.detach().clone() for name, each in tiny.named_parameters()}
    with torch.no_grad():
        expected = tiny(ids).logits
        rescale_channels(tiny, torch.Generator().manual_seed(1))
        assert torch.allclose(tiny(ids).logits, expected, rtol=1e-4, atol=1e-6)
    for name, parameter in tiny.named_parameters():
        changed = bool((parameter != before[name]).any())
        assert changed == ("layers" in name), name


def test_evaluation_of_the_same_weights_is_zero_and_leaves_them(
    tiny: LlamaForCausalLM, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(2))
    evaluator = Evaluator(tmp_path, Rows(ids, torch.ones_like(ids)))
    name = "model.layers.0.mlp.up_proj"
    weight = evaluator.model.get_submodule(name).weight.detach().clone()
    same = evaluator.evaluate({name: weight})
    assert max(map(abs, same.kl)) < 1e-4
    worse = evaluator.evaluate({name: -weight})
    assert min(worse.kl) > 0
    assert torch.equal(evaluator.model.get_submodule(name).weight, weight)
    with torch.no_grad():
        loss = float(tiny(ids, labels=ids).loss)
    assert math.isclose(same.perplexity, math.exp(loss), rel_tol=1e-4)


def test_paired_difference_ignores_what_the_rows_share() -> None:
    theirs = [[1.0, 5.0, 9.0, 13.0]]
    ours = [[0.9, 4.8, 8.9, 12.8]]
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx(-0.15)
    assert found.standard_error == pytest.approx(math.sqrt(0.01 / 3 / 4))


def test_paired_difference_counts_the_spread_of_draws() -> None:
    ours, theirs = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [[0.0, 0.0]] * 3
    found = paired_difference(ours, theirs)
    assert found.value == 2.0
    assert found.standard_error == pytest.approx(math.sqrt(1 / 3))


def test_paired_ratio_of_proportional_tables_has_no_error() -> None:
    found = paired_ratio([[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]])
    assert found.value == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def _row(method: str, variant: str, kl: list[float], draw: int = 0) -> dict[str, Any]:
    cell = Cell(method, variant, 3, 64, True, 6, draw)  # type: ignore[arg-type]
    return cell.job() | {"row_kl": kl, "tokens": 1, "cpu_seconds": 1.0}


def test_quality_claims_hold_and_fail_as_their_sentences_say() -> None:
    rows = [
        _row("stillroom", "default", [0.4, 0.5, 0.6]),
        _row("gptqmodel", "default", [1.0, 1.1, 1.2]),
        _row("gptqmodel", "best", [0.5, 0.6, 0.7]),
        _row("stillroom", "rtn", [0.3, 0.5, 0.7]),
    ]
    claims = {claim.claim.partition(": ")[2]: claim for claim in quality_claims(rows)}
    ending = "KL below {}'s by more than two paired standard errors"
    assert claims[ending.format("gptqmodel-best")].holds
    assert not claims[ending.format("stillroom-rtn")].holds
    ratio = claims["KL at most 0.45 of GPTQModel's defaults"]
    assert not ratio.holds
    assert ratio.measured == pytest.approx(0.5 / 1.1)
    best = claims["KL at most 0.7 of the best peer at its best options (gptqmodel-best)"]
    assert best.measured == pytest.approx(0.5 / 0.6)
    assert len(claims) == 5


def test_what_was_not_measured_is_not_claimed() -> None:
    assert quality_claims([_row("gptqmodel", "default", [1.0, 1.1])]) == []
    assert speed_claims([], floor=1.0) == []


def test_draws_are_compared_with_the_same_draws() -> None:
    rows = [
        _row("stillroom", "default", [1.0, 2.0], draw=0),
        _row("stillroom", "default", [9.0, 9.0], draw=1),
        _row("gptqmodel", "best", [2.0, 3.5], draw=0),
    ]
    below = quality_claims(rows)[0]
    assert below.measured == pytest.approx(-1.25)


def test_speed_claims_use_medians() -> None:
    def timed(method: str, variant: str, seconds: float, repeat: int) -> dict[str, Any]:
        cell = Cell(method, variant, 4, 64, True, 6, repeat=repeat)  # type: ignore[arg-type]
        return cell.job() | {"cpu_seconds": seconds}

    rows = [timed("stillroom", "plain", each, i) for i, each in enumerate([2.0, 3.0, 99.0])]
    rows += [timed("gptqmodel", "default", each, i) for i, each in enumerate([30.0, 30.0, 1.0])]
    fifth, floor = speed_claims(rows, floor=2.5)
    assert fifth.measured == pytest.approx(0.1)
    assert fifth.holds
    assert floor.measured == pytest.approx(1.2)
    assert floor.holds


def test_floor_counts_every_product_of_a_small_block() -> None:
    shape = BlockShape(hidden=4, intermediate=8, heads=2, key_value_heads=1)
    assert shape.linears == [(4, 4), (2, 4), (2, 4), (4, 4), (8, 4), (8, 4), (4, 8)]
    weights = sum(out * columns for out, columns in shape.linears)
    found = floor_flops(shape, blocks=2, rows=3, length=5)
    assert found["forward"] == 2 * 2 * 15 * (2 * weights + 2 * 5 * 4)
    assert found["hessian"] == 2 * 15 * (3 * 16 + 64)
    solver = sum(out * columns**2 for out, columns in shape.linears) + 4 / 3 * (3 * 64 + 512)
    assert found["solver"] == pytest.approx(2 * solver)
    assert sum(out * columns for out, columns in SMOLLM2.linears) == 3_538_944


def test_payload_counts_bits_scales_and_zero_points() -> None:
    cell = Cell("stillroom", "default", 3, 64, False, 6)
    assert payload_bytes(cell, [(64, 128)]) == 64 * 128 * 3 // 8 + 128 * (16 + 3) // 8
    channel = Cell("stillroom", "default", 4, -1, True, 6)
    assert payload_bytes(channel, [(64, 128)]) == 64 * 128 // 2 + 64 * 2


def test_cells_have_names_of_their_own_and_ours_beside_each_peer() -> None:
    cells = table_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    ours = {(cell.setting, cell.draw) for cell in cells if cell.method == "stillroom"}
    assert all((cell.setting, cell.draw) in ours for cell in cells)


def test_linear_share_of_a_line_and_of_a_square() -> None:
    assert linear_share({1: 3.0, 2: 5.0, 3: 7.0}) == pytest.approx(1.0)
    assert linear_share({n: float(n**2) for n in (5, 10, 20, 30)}) < 0.98


def test_no_training_phrase_is_a_part_of_a_test_sentence() -> None:
    words = [f"w{i}" for i in range(40)]
    long = [" ".join(words[i : i + 16]) for i in (0, 20)]
    examples = [(long[0], 1), (long[1], 0), ("w1 w2", 1), ("w21 w22", 0), ("elsewhere", 1)]
    train, test = split_by_sentence(examples, random.Random(0), wanted=2)
    assert {each.text for each in test} in ({long[0], "w1 w2"}, {long[1], "w21 w22"})
    for phrase in train:
        assert not any(f" {phrase.text} " in f" {each.text} " for each in test)


def test_clustered_loss_of_one_phrase_in_each_sentence_is_the_plain_error() -> None:
    before, after = [True] * 4, [True, True, False, False]
    found = clustered_loss(before, after, [0, 1, 2, 3])
    assert found.value == 50.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(1 / 3 / 4))


def test_the_readme_and_the_page_say_what_results_json_says():
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == summarise(results)
    readme = (ROOT / "README.md").read_text()
    shown = [
        row
        for row in results["table"]["rows"]
        if row["blocks"] == 30 and row["symmetric"] and row["group_size"] == 64
    ]
    assert len(shown) >= 6
    for row in shown:
        assert f"{row['kl']:.4f}" in readme, row["name"]
