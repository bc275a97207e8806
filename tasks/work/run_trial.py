"""Run one trial of a search for the intrinsic dimension."""

import json
from dataclasses import asdict, replace

from stillroom.data.prepare import load_prepared
from stillroom.intrinsic_dimension.artifact import load_base, save_subspace
from stillroom.intrinsic_dimension.search import Trial
from stillroom.intrinsic_dimension.subspace import SubspaceModel
from stillroom.intrinsic_dimension.trial import TrialOptions, run_trial
from tasks.training_curves import write_history
from tasks.work.bench import Bench, Result
from tasks.work.training import history_metrics, training_options

TRIAL = "trial.json"


def work(bench: Bench) -> Result:
    """Write the trial's score, its curves, and the trained subspace where it was one."""
    section = bench.section
    trial = Trial(**section["trial"])
    data = load_prepared(bench.inputs["data"])
    names = data.train.label_names
    base = load_base(bench.inputs["base"], task=bench.task, label_names=names, head_seed=trial.seed)
    training = replace(training_options(bench), seed=trial.seed)
    options = TrialOptions(
        full=training,
        subspace=training,
        projection=section.get("projection", "fastfood"),
        structure_aware=section.get("structure_aware", False),
    )
    outcome = run_trial(
        trial,
        base.to(bench.device),
        (data.train, data.evaluation),
        options,
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    if isinstance(outcome.model, SubspaceModel):
        reference = f"stillroom:{bench.order.inputs['base']}"
        save_subspace(
            outcome.model, bench.output, reference, label_names=names, head_seed=trial.seed
        )
    facts = {
        "trial": asdict(trial),
        "score": outcome.score,
        "figures": outcome.figures,
        "size": asdict(outcome.size),
    }
    (bench.output / TRIAL).write_text(json.dumps(facts, sort_keys=True))
    metrics = {"score": outcome.score, **outcome.figures}
    if outcome.history.steps:
        write_history(outcome.history, bench.output)
        metrics |= history_metrics(outcome.history)
        metrics["trained_parameters"] = float(trial.dimension or outcome.size.parameters)
    return Result(licence=bench.licence("base"), metrics=metrics)
