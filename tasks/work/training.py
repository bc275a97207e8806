"""What the stages that train share: how the loop runs, and what they leave."""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from stillroom.data.prepare import PreparedData
from stillroom.evaluation.reload import measure_reload
from stillroom.models import save_model
from stillroom.training.history import TrainingHistory
from stillroom.training.options import TrainingOptions
from tasks.training_curves import write_history
from tasks.work.bench import Bench, Result


def training_options(bench: Bench) -> TrainingOptions:
    """Return the loop's options from the recipe's training section."""
    unkeyed = bench.order.unkeyed
    section: dict[str, Any] = bench.section["training"] | unkeyed.get("training", {})
    parallel = unkeyed.get("parallel", "ddp")
    return TrainingOptions(seed=bench.order.seed, parallel=parallel, **section)


def save_trained(
    bench: Bench,
    model: PreTrainedModel,
    tokenizer: Any,
    data: PreparedData,
    history: TrainingHistory,
    licence: str,
) -> Result:
    """Write the model and its curves, and check that it loads as what it was saved as."""
    if bench.rank:
        return Result(licence)
    save_model(model, tokenizer, bench.output)
    write_history(history, bench.output)
    reload = measure_reload(model, bench.load(bench.output), data.evaluation)
    metrics = reload_metrics(reload) | history_metrics(history)
    return Result(licence=licence, metrics=metrics)


def reload_metrics(reload: Any) -> dict[str, float]:
    """Return what the gates need of a reload check."""
    return {f"reload_{name}": value for name, value in asdict(reload).items()}


def history_metrics(history: TrainingHistory) -> dict[str, float]:
    """Return the last figures of a training run."""
    speeds = sorted(history.tokens_per_second)
    metrics = {"steps": float(len(history.steps)), "final_loss_nats": history.loss[-1]}
    if speeds:
        metrics["median_tokens_per_second"] = speeds[len(speeds) // 2]
    if history.best_step:
        metrics["best_step"] = float(history.best_step)
    return metrics | {f"final_{name}": value for name, value in history.kept().items()}
