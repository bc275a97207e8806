"""Adapters through the road: on a quantized base, beside it and merged, registered and pulled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.flows.terminal import Terminal, assert_done, assert_refused

DATA = {
    "train": {"source": "text.jsonl"},
    "sequence_length": 32,
    "max_train_tokens": 1024,
    "max_evaluation_tokens": 256,
    "calibration_rows": 8,
}
TRAINING = {"steps": 6, "batch_rows": 4, "learning_rate": 0.01}
RECIPE: dict[str, Any] = {
    "name": "adapted",
    "teacher": {"source": "teacher"},
    "data": DATA,
    "quantization": {"bits": 4, "group_size": 32},
    "evaluation": {"prefill_tokens": 8, "decode_tokens": 4, "repeats": 2},
    "publish": {"name": "adapted"},
    "execution": {"threads": 1},
}
LORA = {"name": "law", "rank": 2, "merge": {"max_added_nats": 5}}
BOTTLENECK = {"name": "trade", "method": "bottleneck", "width": 4}
BOTH = [{**each, "data": DATA, "training": TRAINING} for each in (LORA, BOTTLENECK)]


@pytest.mark.integration
def test_adapters_sit_beside_a_quantized_base_and_inside_it(
    terminal: Callable[..., Terminal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillroom.adapters.folder import load_adapter
    from stillroom.models import load_model
    from stillroom.pull import pull

    opened = terminal()
    opened.write(RECIPE)  # in portions, as each command has a time to end in
    assert_done(opened.compress())
    assert opened.versions() == 1
    opened.write(RECIPE | {"adapters": BOTH})
    assert_done(opened.compress(), cached=("quantize", "evaluate quantized teacher"))
    assert opened.versions() == 4  # law, trade and law merged; the base is the same version
    report = json.loads((opened.home / "reports" / "adapted" / "report.json").read_text())
    judged = {gate["name"] for gate in report["gates"]}
    assert judged >= {"reload", "reload (law)", "fallback (law)"}
    assert {row["name"] for row in report["rows"]} == {
        "teacher",
        "quantized teacher",
        "quantized teacher + law",
        "quantized teacher + law, merged",
        "quantized teacher + trade",
    }

    address = f"sqlite:///{opened.home / 'mlflow.db'}"
    for name in ("adapted-trade", "adapted-law", "adapted-law-merged"):
        pull(f"models:/{name}@champion", tmp_path / name, tracking_uri=address)
    assert json.loads((tmp_path / "adapted-law-merged" / "config.json").read_text())[
        "quantization_config"
    ]
    ids = torch.arange(4, 24)[None]
    trade = tmp_path / "adapted-trade"
    with torch.no_grad():
        base = load_model(trade / "base", weights="packed")
        plain = base(input_ids=ids).logits
        worn = load_adapter(base, trade / "adapter")(input_ids=ids).logits
        merged = load_model(tmp_path / "adapted-law-merged", weights="packed")
        assert torch.isfinite(merged(input_ids=ids).logits).all()
    assert not torch.equal(plain, worn)
    # Of methods that transformers does not know, it must not load the base alone.
    assert not (trade / "adapter" / "config.json").exists()


@pytest.mark.integration
def test_a_merge_that_loses_too_much_ends_the_run(terminal: Callable[..., Terminal]) -> None:
    opened = terminal()
    strict = {**BOTH[0], "merge": {"max_added_nats": 0.0}}
    rough = {"bits": 2, "group_size": 32, "method": "rtn"}
    opened.write(RECIPE | {"quantization": rough, "adapters": [strict]})
    assert_refused(opened.compress(), "adapter law: merged and quantized again", "max_added_nats")
    assert opened.versions() == 0
