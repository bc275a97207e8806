"""Store a model's weights in few bits, and check that the checkpoint is the model."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from stillroom.data.prepare import load_prepared
from stillroom.evaluation.figures import ReloadCheck
from stillroom.labels import require_trained_head
from stillroom.models import load_tokenizer
from stillroom.quantization.accounting import original_nats, require_perplexity, summarise
from stillroom.quantization.formats.export import check_folder, save_quantized
from stillroom.quantization.formats.gguf_export import export_gguf, require_gguf
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.quantization.weight import LayerAccount
from tasks.work.bench import Bench, Result
from tasks.work.training import reload_metrics

OPTIONS = {field.name for field in fields(QuantizationOptions)}


def work(bench: Bench) -> Result:
    """Write a GPTQ checkpoint, and layers.json with the account of each layer."""
    section = bench.section
    options = quantization_options(section)
    if bench.task == "sequence_classification":
        require_trained_head(bench.inputs["base"])
    if section["gguf"]:
        require_gguf(bench.inputs["base"], options.group_size)
    rows = load_prepared(bench.inputs["data"]).calibration
    do = _with_gptqmodel if section["engine"] == "gptqmodel" else _with_stillroom
    accounts, reload, metrics = do(bench, rows, options)
    write_accounts(bench, accounts)
    metrics |= summarise(accounts) | reload_metrics(reload)
    if section["gguf"]:
        metrics |= write_gguf(bench)
    return Result(licence=bench.licence("base"), metrics=metrics)


def quantization_options(section: dict[str, Any]) -> QuantizationOptions:
    """Return the library's options from the recipe's quantization section."""
    return QuantizationOptions(**{k: v for k, v in section.items() if k in OPTIONS})


def write_accounts(bench: Bench, accounts: Sequence[LayerAccount]) -> None:
    """Write layers.json: the account of each layer, with the number of its block."""
    (bench.output / "layers.json").write_text(json.dumps(_listed(accounts), indent=1))


Done = tuple[Sequence[LayerAccount], ReloadCheck, dict[str, float]]


def _with_stillroom(bench: Bench, rows: Any, options: QuantizationOptions) -> Done:
    section, base = bench.section, bench.inputs["base"]
    metrics: dict[str, float] = {}
    layer_options = None
    if section["mixed"]:
        layer_options, metrics = _mixed_bits(bench, rows, options)
    model, blocks = bench.open_streamed(base)
    bound, original = section["max_perplexity_ratio"], None
    if bound and bench.task == "causal_lm":
        original = original_nats(model, blocks, rows, options)
    result = quantize_model(
        model,
        rows,
        options,
        blocks=blocks,
        layer_options=layer_options,
        skip=tuple(section["skip"]),
        checkpoints=bench.checkpoints,
        progress=bench.progress,
    )
    if original is not None:
        metrics["calibration_perplexity_ratio"] = require_perplexity(result, original, bound)
    save_quantized(model, load_tokenizer(base), result, bench.output, blocks=blocks)
    reload = check_folder(bench.output, result, bench.task, section["device"])
    return result.accounts, reload, metrics


def _with_gptqmodel(bench: Bench, rows: Any, options: QuantizationOptions) -> Done:
    from stillroom.evaluation.reload import measure_reload
    from stillroom.quantization.gptqmodel_engine import quantize_with_gptqmodel

    base, skip = bench.inputs["base"], tuple(bench.section["skip"])
    accounts = quantize_with_gptqmodel(base, rows, options, bench.output, skip=skip)
    # What it computed in memory is gone: two fresh loads, packed and dense, check each other.
    packed = bench.load(bench.output, weights="packed")
    return accounts, measure_reload(packed, bench.load(bench.output), rows), {}


def _mixed_bits(
    bench: Bench, rows: Any, options: QuantizationOptions
) -> tuple[dict[str, QuantizationOptions], dict[str, float]]:
    from stillroom.quantization.allocation import LayerChoice
    from stillroom.quantization.mixed import choose_bits

    mixed = bench.section["mixed"]
    sizes = mixed["group_sizes"] or [options.group_size]
    offers = [LayerChoice(bits, size) for bits in mixed["bits"] for size in sizes]
    layers, found = choose_bits(
        bench.load(bench.inputs["base"]),
        rows,
        options,
        offers,
        mixed["max_bytes"],
        skip=tuple(bench.section["skip"]),
        tokens=mixed["measured_tokens"],
        checkpoints=bench.checkpoints,
        progress=bench.progress,
    )
    return layers, {
        "mixed_size_bytes": float(found.allocation.size_bytes),
        "mixed_predicted_kl_nats": found.allocation.cost,
        "mixed_joint_kl_nats": found.joint_after,
    }


def write_gguf(bench: Bench) -> dict[str, float]:
    """Write the checkpoint's GGUF export beside it; return its figures."""
    report = export_gguf(bench.output, bench.output / "model.gguf")
    return {"gguf_largest_weight_error": report.largest_weight_error}


def _listed(accounts: Sequence[LayerAccount]) -> list[dict[str, object]]:
    return [
        {"name": account.name, "block": _block(account.name)} | asdict(account)
        for account in accounts
    ]


def _block(name: str) -> int | None:
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None
