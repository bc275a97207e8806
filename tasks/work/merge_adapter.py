"""Merge an adapter into its quantized base: one model of few bits, refused if it lost too much."""

from stillroom.adapters.folder import DEFAULT, load_adapter
from stillroom.adapters.requantize import merge_requantized, require_little_added
from stillroom.data.prepare import load_prepared
from stillroom.models import load_tokenizer
from stillroom.quantization.accounting import summarise
from stillroom.quantization.formats.export import check_folder, save_quantized
from tasks.work.bench import Bench, Result
from tasks.work.quantize_model import quantization_options, write_accounts, write_gguf
from tasks.work.training import reload_metrics


def work(bench: Bench) -> Result:
    """Write a GPTQ checkpoint, and layers.json with the account of each layer."""
    section, base = bench.section, bench.inputs["base"]
    data = load_prepared(bench.inputs["data"])
    merged = merge_requantized(
        load_adapter(bench.load(base), bench.inputs["adapter"]),
        DEFAULT,
        data.calibration,
        data.evaluation,
        quantization_options(section),
        skip=tuple(section["skip"]),
        checkpoints=bench.checkpoints,
        progress=bench.progress,
    )
    require_little_added(merged, section["max_added_nats"], section["name"])
    save_quantized(merged.model, load_tokenizer(base), merged.result, bench.output)
    reload = check_folder(bench.output, merged.result, bench.task, section["device"])
    write_accounts(bench, merged.result.accounts)
    metrics = summarise(merged.result.accounts) | reload_metrics(reload)
    metrics |= {"held_out_nats": merged.inside, "added_nats": merged.added_nats}
    if section["gguf"]:
        metrics |= write_gguf(bench)
    return Result(licence=bench.licence("base"), metrics=metrics)
