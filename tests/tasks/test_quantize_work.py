"""The stage that quantizes: what each part of the recipe's section leaves behind."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillroom.config import Quantization
from stillroom.errors import MismatchError, StageError
from stillroom.models import load_model, save_model
from tasks.stages import QUANTIZE_MODEL, as_json
from tasks.work import quantize_model
from tests.stillroom.quantization.formats.gguf_models import byte_tokenizer
from tests.stillroom.quantization.test_sequential import rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer
from tests.tasks.benches import new_bench


@pytest.fixture
def quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    save_model(tiny_llama(hidden=64), tiny_tokenizer(), tmp_path / "base")
    prepared = SimpleNamespace(calibration=rows(count=12))
    monkeypatch.setattr(quantize_model, "load_prepared", lambda _: prepared)

    def work(**section: Any) -> tuple[dict[str, float], Path]:
        given = as_json(Quantization(group_size=32, **section))
        inputs = {"base": tmp_path / "base", "data": tmp_path}
        bench = new_bench(QUANTIZE_MODEL, given, tmp_path, inputs)
        return quantize_model.work(bench).metrics, bench.output

    return work


def test_the_default_leaves_a_checkpoint_and_accounts(quantize: Any) -> None:
    metrics, output = quantize()
    assert metrics["fallback_layers"] == 0
    assert metrics["reload_max_difference"] < 1e-5 * metrics["reload_max_logit"]
    accounts = json.loads((output / "layers.json").read_text())
    assert len(accounts) == metrics["quantized_layers"] == 14
    assert {"held_out_error", "babai_bound", "damping", "clipped", "block"} <= accounts[0].keys()
    load_model(output)


def test_mixed_bits_and_packed_embeddings_are_written(quantize: Any) -> None:
    mixed = {"max_bytes": 40_000, "bits": (2, 4, 8), "measured_tokens": 32}
    metrics, output = quantize(mixed=mixed, embedding_bits=8)
    assert metrics["mixed_size_bytes"] <= 40_000
    bits = {account["bits"] for account in json.loads((output / "layers.json").read_text())}
    assert len(bits) > 1
    section = json.loads((output / "config.json").read_text())["quantization_config"]
    assert section["dynamic"]
    load_model(output)


def test_mixed_bits_leave_skipped_layers_out(quantize: Any) -> None:
    mixed = {"max_bytes": 10_000, "bits": (2, 4), "measured_tokens": 32}
    metrics, output = quantize(mixed=mixed, skip=("*mlp*",))
    assert metrics["quantized_layers"] == 8
    assert metrics["mixed_size_bytes"] <= 10_000
    assert all(
        "mlp" not in each["name"] for each in json.loads((output / "layers.json").read_text())
    )


def test_a_perplexity_beyond_the_bound_fails_and_names_the_worst_layer(quantize: Any) -> None:
    with pytest.raises(StageError, match=r"model\.layers\.\d\..*_proj, .* % of its output"):
        quantize(bits=2, max_perplexity_ratio=1.0001)


def test_a_perplexity_within_the_bound_is_a_metric(quantize: Any) -> None:
    metrics, _ = quantize(bits=8, max_perplexity_ratio=1.5)
    assert 0.5 < metrics["calibration_perplexity_ratio"] < 1.5


def test_what_rounded_embeddings_lose_counts_for_the_perplexity(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = rows(count=4)
    prepared = SimpleNamespace(calibration=few)
    monkeypatch.setattr(quantize_model, "load_prepared", lambda _: prepared)
    original = tiny_llama(hidden=64)
    with torch.no_grad():
        # The largest of a group takes its scale: the others are rounded away.
        original.get_input_embeddings().weight[:, ::32] *= 30
    save_model(original, tiny_tokenizer(), tmp_path / "base")
    metrics, output = quantize(bits=8, embedding_bits=8, max_perplexity_ratio=1e6)
    true = nats(load_model(output), few) - nats(original, few)
    assert abs(true) > 0.02
    assert math.log(metrics["calibration_perplexity_ratio"]) == pytest.approx(true, abs=1e-3)


@torch.no_grad()
def nats(model: Any, data: Any) -> float:
    labels = data.input_ids.masked_fill(data.attention_mask == 0, -100)
    ids, mask = data.input_ids, data.attention_mask
    return float(model.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss)


def test_what_gguf_cannot_hold_is_refused_before_any_work(
    quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(quantize_model, "quantize_model", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(MismatchError, match="BPE tokenizer"):
        quantize(gguf=True)


def test_a_gguf_is_written_beside_the_checkpoint(quantize: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_model(tiny_llama(hidden=64, vocab=300), byte_tokenizer(), tmp_path / "base")
    metrics, output = quantize(gguf=True)
    assert (output / "model.gguf").stat().st_size > 0
    assert metrics["gguf_largest_weight_error"] < 0.05
