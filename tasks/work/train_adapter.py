"""Train an adapter on the frozen base."""

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import save_adapter
from stillroom.adapters.options import Method, make_options
from stillroom.adapters.training import task_of, train_adapter
from stillroom.data.prepare import load_prepared
from tasks.stages import TRUSTS_CODE
from tasks.training_curves import write_history
from tasks.work.bench import Bench, Result
from tasks.work.training import history_metrics, training_options

# What a recipe says of an adapter beside its method's options.
OTHERS = ("method", "name", "training", "task", "device", "dtype", TRUSTS_CODE)


def work(bench: Bench) -> Result:
    """Write the adapter and its curves."""
    method: Method = bench.section["method"]
    fields = {key: value for key, value in bench.section.items() if key not in OTHERS}
    data = load_prepared(bench.inputs["data"])
    # What is quantized stays so: one layer at a time is dequantized, forward and backward.
    adapted = AdaptedModel(bench.load(bench.inputs["base"], weights="packed"))
    name, options = bench.section["name"], training_options(bench)
    adapted.add(name, make_options(method, fields), task=task_of(data.train), seed=options.seed)
    history = train_adapter(
        adapted,
        name,
        data.train,
        options,
        evaluation=data.evaluation,
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    if bench.rank:
        return Result(bench.licence("base"))
    save_adapter(adapted, name, bench.output, f"stillroom:{bench.order.inputs['base']}")
    write_history(history, bench.output)
    trained = sum(p.numel() for p in adapted.worn(name).parameters())
    metrics = history_metrics(history) | {"trained_parameters": float(trained)}
    return Result(licence=bench.licence("base"), metrics=metrics)
