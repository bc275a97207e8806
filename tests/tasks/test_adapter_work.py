"""The stages of adapters: train one of each method on a quantized base, and merge one into it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from stillroom.adapters.folder import load_adapter
from stillroom.adapters.options import KINDS
from stillroom.config import Adapter, Merge, Quantization
from stillroom.errors import MismatchError, StageError
from stillroom.models import load_model
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tasks.stages import MERGE_ADAPTER, TRAIN_ADAPTER, as_json
from tasks.work import merge_adapter, train_adapter
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_tokenizer
from tests.stillroom.tiny_decoders import tiny_gpt2
from tests.tasks.benches import new_bench

LITTLE = {"steps": 6, "batch_rows": 4, "learning_rate": 1e-2, "evaluate_every_steps": 3}
SMALL: dict[str, dict[str, Any]] = {
    "bottleneck": {"width": 4},
    "prefix_tuning": {"num_virtual_tokens": 3, "encoder_width": 8},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"template": [[0, 2], [3, 1]], "encoder_width": 8},
    "lora": {"rank": 2},
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return a GPT-2, which has biases, in 4 bits, and text of which half is held out."""
    model, rows = tiny_gpt2(), token_rows(16)
    options = QuantizationOptions(bits=4, group_size=16)
    save_quantized(model, tiny_tokenizer(), quantize_model(model, rows, options), tmp_path / "base")
    data = SimpleNamespace(
        train=rows.take(slice(0, 8)), evaluation=rows.take(slice(8, 16)), calibration=rows
    )
    for module in (train_adapter, merge_adapter):
        monkeypatch.setattr(module, "load_prepared", lambda _: data)
    return {"base": tmp_path / "base", "data": tmp_path}


def trained(method: str, inputs: dict[str, Path], folder: Path) -> tuple[Any, Path]:
    """Have the stage make an adapter as a recipe asks for it; return its figures and folder."""
    given = {"name": "law", "method": method, "data": {"train": {"source": "builtin:python-docs"}}}
    adapter: Any = TypeAdapter(Adapter).validate_python(
        given | SMALL.get(method, {}) | {"training": LITTLE}
    )
    section = as_json(adapter, "data", "training", "merge")
    section |= {"training": as_json(adapter.training)}
    folder.mkdir()
    bench = new_bench(TRAIN_ADAPTER, section, folder, inputs)
    return train_adapter.work(bench).metrics, bench.output


@pytest.mark.parametrize("method", KINDS)
def test_every_method_learns_on_a_quantized_base_and_loads_again(
    method: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    metrics, output = trained(method, inputs, tmp_path / "work")
    assert metrics["trained_parameters"] > 0
    assert metrics["final_loss_nats"] < 5
    assert (output / "history.json").exists() or list(output.glob("*.parquet"))
    ids = token_rows(4).input_ids
    base = load_model(inputs["base"], weights="packed")
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        worn = load_adapter(base, output)
        changed = worn(input_ids=ids).logits
        worn.select(None)
        assert torch.equal(worn(input_ids=ids).logits, plain)
    assert not torch.equal(changed, plain)


def test_a_merged_adapter_is_one_quantized_model_or_none(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    _, adapter = trained("lora", inputs, tmp_path / "work")
    section = as_json(Quantization(group_size=16)) | {"name": "law"}
    both = inputs | {"adapter": adapter}
    for bound in (5.0, 0.0):
        (tmp_path / f"{bound}").mkdir()
        asked = section | as_json(Merge(max_added_nats=bound))
        bench = new_bench(MERGE_ADAPTER, asked, tmp_path / f"{bound}", both)
        if bound:
            metrics = merge_adapter.work(bench).metrics
            assert metrics["reload_max_difference"] < 1e-4 * metrics["reload_max_logit"]
            assert metrics["fallback_layers"] == 0
            merged = load_model(bench.output, weights="packed")
            assert any("qweight" in name for name in merged.state_dict())
        elif metrics["added_nats"] > 0:
            with pytest.raises(StageError, match="adapter law: merged and quantized again"):
                merge_adapter.work(bench)


def test_what_is_no_low_rank_update_is_not_merged(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, adapter = trained("bottleneck", inputs, tmp_path / "work")
    (tmp_path / "merge").mkdir()
    section = as_json(Quantization(group_size=16)) | as_json(Merge()) | {"name": "law"}
    both = inputs | {"adapter": adapter}
    with pytest.raises(MismatchError, match="bottleneck came"):
        merge_adapter.work(new_bench(MERGE_ADAPTER, section, tmp_path / "merge", both))
