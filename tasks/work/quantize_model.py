"""Store a model's weights in few bits, and check that the checkpoint is the model."""

import json
import re
from dataclasses import asdict, fields

from stillroom.data.prepare import load_prepared
from stillroom.evaluation.reload import measure_reload
from stillroom.models import load_tokenizer
from stillroom.quantization.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import QuantizationResult, quantize_model
from tasks.work.bench import Bench, Result
from tasks.work.training import reload_metrics

OPTIONS = {field.name for field in fields(QuantizationOptions)}


def work(bench: Bench) -> Result:
    """Write a GPTQ checkpoint, and layers.json with the account of each layer."""
    section, base = bench.section, bench.inputs["base"]
    calibration = load_prepared(bench.inputs["data"]).calibration
    model = bench.load(base)
    options = QuantizationOptions(**{k: v for k, v in section.items() if k in OPTIONS})
    result = quantize_model(
        model,
        calibration,
        options,
        skip=tuple(section["skip"]),
        checkpoints=bench.checkpoints,
        progress=bench.progress,
    )
    save_quantized(model, load_tokenizer(base), result, bench.output)
    (bench.output / "layers.json").write_text(json.dumps(_account(result), indent=1))
    reload = measure_reload(model, bench.load(bench.output), calibration)
    errors = sorted(account.relative_error for account in result.accounts)
    metrics = {
        "quantized_layers": float(len(result.layers)),
        "fallback_layers": float(result.fallbacks),
        "median_relative_error": errors[len(errors) // 2],
        "largest_relative_error": errors[-1],
    }
    return Result(licence=bench.licence("base"), metrics=metrics | reload_metrics(reload))


def _account(result: QuantizationResult) -> list[dict[str, object]]:
    return [
        {"name": name, "block": _block(name)} | asdict(layer.account)
        for name, layer in result.layers.items()
    ]


def _block(name: str) -> int | None:
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None
