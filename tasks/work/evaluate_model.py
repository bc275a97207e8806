"""Measure a model, perhaps wearing an adapter, on held-out text."""

from pathlib import Path
from typing import Any

from stillroom.adapters.folder import load_adapter
from stillroom.data.examples import Examples
from stillroom.data.prepare import load_prepared
from stillroom.errors import MismatchError
from stillroom.evaluation.cost import Workload, folder_size_bytes, measure_cost
from stillroom.evaluation.quality import measure_quality
from stillroom.labels import classes_of, require_same_classes, require_trained_head
from stillroom.models import load_tokenizer, tokenizer_hash
from stillroom.quantization.kernels.choose import fastest_weights
from tasks.work.bench import Bench, Result


def work(bench: Bench) -> Result:
    """Write quality.json (sums per document, for paired comparisons) and cost.json."""
    section, inputs = bench.section, bench.inputs
    folders = [inputs["model"], *([inputs["adapter"]] if "adapter" in inputs else [])]
    data = load_prepared(inputs["data"])
    _require_same_tokenizer(inputs["model"], data.evaluation)
    if bench.task == "sequence_classification" and "adapter" not in inputs:
        require_trained_head(inputs["model"])
    itself = len(folders) == 1 and bench.order.inputs["model"] == bench.order.inputs["teacher"]
    teacher = None if itself else bench.load_teacher()
    laid_out = itself and bench.lays_out_teacher
    model: Any = bench.load_teacher() if laid_out else _as_it_is_served(bench)
    if data.evaluation.label_names:
        require_same_classes(
            classes_of(getattr(model, "base", model).config),
            data.evaluation.label_names,
            "the model",
            "name the text's classes as the model does; where it is the champion, publish under "
            "another name or leave out the gate that compares with it",
        )
    quality = measure_quality(
        model,
        teacher,
        data.evaluation,
        task=bench.task,
        batch_rows=section["batch_rows"],
        progress=bench.progress,
    )
    workload = Workload(section["prefill_tokens"], section["decode_tokens"], section["repeats"])
    cost = measure_cost(
        model,
        folder_size_bytes(*folders),
        task=bench.task,
        workload=workload,
        progress=bench.progress,
    )
    (bench.output / "quality.json").write_text(quality.to_json())
    (bench.output / "cost.json").write_text(cost.to_json())
    metrics = {
        "nats_per_token": quality.estimate("nats").value,
        "kl_nats_per_token": quality.estimate("kl_nats").value,
        "agreement": quality.estimate("agreement").value,
        "size_bytes": float(cost.size_on_disk_bytes),
        "memory_bytes": float(cost.memory_bytes),
        "prefill_per_second": cost.prefill_per_second.value,
    }
    if cost.decode_tokens_per_second:
        metrics["decode_tokens_per_second"] = cost.decode_tokens_per_second.value
    return Result(licence=bench.licence("model"), metrics=metrics)


def _as_it_is_served(bench: Bench) -> Any:
    weights = fastest_weights(bench.section["device"])
    model = bench.load(bench.inputs["model"], weights=weights)
    if "adapter" in bench.inputs:
        return load_adapter(model, bench.inputs["adapter"])
    return model


def _require_same_tokenizer(folder: Path, rows: Examples) -> None:
    own = tokenizer_hash(load_tokenizer(folder))
    if own != rows.tokenizer_hash:
        raise MismatchError(
            f"the model's tokenizer ({own[:12]}) is not the one that the text was prepared with "
            f"({rows.tokenizer_hash[:12]}): losses a token cannot be compared; where it is the "
            "champion, publish under another name or leave out the gate that compares with it"
        )
