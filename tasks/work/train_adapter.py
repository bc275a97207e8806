"""Train an adapter on the frozen base."""

from stillroom.adapters.lora import LoraOptions, save_adapter, train_lora
from stillroom.data.prepare import load_prepared
from tasks.training_curves import write_history
from tasks.work.bench import Bench, Result
from tasks.work.training import history_metrics, training_options


def work(bench: Bench) -> Result:
    """Write the adapter and its curves."""
    section = bench.section
    targets = section["target_modules"]
    options = LoraOptions(
        rank=section["rank"],
        alpha=section["alpha"],
        dropout=section["dropout"],
        target_modules=tuple(targets) if targets else None,
    )
    data = load_prepared(bench.inputs["data"])
    adapted, history = train_lora(
        bench.load(bench.inputs["base"]),
        data.train,
        options,
        training_options(bench),
        evaluation=data.evaluation,
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    if bench.rank:
        return Result(bench.licence("base"))
    save_adapter(adapted, bench.output, f"stillroom:{bench.order.inputs['base']}")
    write_history(history, bench.output)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    metrics = history_metrics(history) | {"trained_parameters": float(trained)}
    return Result(licence=bench.licence("base"), metrics=metrics)
