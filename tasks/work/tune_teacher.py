"""Teach the teacher the task's labels or hidden words, where it has never seen them."""

import torch

from stillroom.data.prepare import load_prepared
from stillroom.fine_tuning import fine_tune
from stillroom.models import load_pretrained, load_tokenizer
from tasks.work.bench import Bench, Result
from tasks.work.training import save_trained, training_options


def work(bench: Bench) -> Result:
    """Write the teacher with a new head, trained on the labels or the hidden words."""
    folder = bench.inputs["teacher"]
    data = load_prepared(bench.inputs["data"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.order.seed)  # the new head's weights
        model = load_pretrained(folder, task=bench.task, label_names=data.train.label_names)
    model.to(bench.device)  # type: ignore[arg-type]
    history = fine_tune(
        model,
        data.train,
        training_options(bench),
        evaluation=data.evaluation,
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    return save_trained(
        bench, model, load_tokenizer(folder), data, history, bench.licence("teacher")
    )
