"""Run a model over held-out examples and sum what it gets right, document by document."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.contents import Task
from stillroom.data.examples import Examples
from stillroom.errors import DataError, MismatchError, NotFiniteError
from stillroom.evaluation.estimates import (
    Estimate,
    Metric,
    Quality,
    paired_difference,
    paired_estimate,
    paired_ratio,
)
from stillroom.layout import input_device
from stillroom.progress import Progress, silent

__all__ = [
    "Estimate",
    "Metric",
    "Quality",
    "measure_qualities",
    "measure_quality",
    "paired_difference",
    "paired_estimate",
    "paired_ratio",
]

CHUNK = 128
"""Predictions whose (CHUNK, vocab) log-probabilities are in memory at once."""


def measure_quality(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    examples: Examples,
    *,
    task: Task = "causal_lm",
    batch_rows: int = 4,
    progress: Progress = silent,
) -> Quality:
    """Measure `model` on `examples`: cross-entropy, KL to the teacher, agreement, accuracy.

    With no teacher, or the model as its own, KL is 0 and agreement 1, and one model runs.

    Raises:
        DataError: the examples hold nothing to predict.
        MismatchError: the models have different outputs.
        NotFiniteError: a result is NaN or infinite.
    """
    models = {"model": model}
    return measure_qualities(
        models, teacher, examples, task=task, batch_rows=batch_rows, progress=progress
    )["model"]


def measure_qualities(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | None,
    examples: Examples,
    *,
    task: Task = "causal_lm",
    batch_rows: int = 4,
    progress: Progress = silent,
) -> dict[str, Quality]:
    """Measure several models on the same examples while the teacher runs once.

    Raises:
        DataError: the examples hold nothing to predict.
        MismatchError: the models have different outputs.
        NotFiniteError: a result is NaN or infinite.
    """
    tallies: dict[str, dict[int, _Sums]] = {name: {} for name in models}
    modules = [*models.values()] if teacher is None else [teacher, *models.values()]
    with evaluating(modules):
        for start in range(0, len(examples), batch_rows):
            batch = examples.take(slice(start, start + batch_rows))
            targets = _Targets.of(batch, task)
            reference = None if teacher is None else predict(teacher, batch)
            for name, model in models.items():
                logits = reference if model is teacher else predict(model, batch)
                assert logits is not None
                _tally(tallies[name], logits, None if model is teacher else reference, targets)
            progress(min(start + batch_rows, len(examples)), len(examples), "rows")
    return {name: _quality(name, tally, task) for name, tally in tallies.items()}


@contextmanager
def evaluating(modules: list[PreTrainedModel]) -> Iterator[None]:
    """Hold models in evaluation mode without gradients, then put each module back as it was."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.train(mode=False)
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training


def predict(model: PreTrainedModel, batch: Examples) -> Tensor:
    """Return logits: (rows, length, vocab) of a language model, (rows, labels) of a classifier.

    Of a model without a head they are the last hidden states, (rows, length, hidden).
    """
    device = input_device(model)
    ids = batch.input_ids.to(device)
    decoder = {}
    if model.config.is_encoder_decoder and type(model).__name__.endswith("Model"):
        decoder = {"decoder_input_ids": ids}  # which a head would have made
    output = model(input_ids=ids, attention_mask=batch.attention_mask.to(device), **decoder)
    logits: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if logits.dim() == 3:
        # Prompt tuning puts its virtual tokens in front: the text's positions are the last ones.
        logits = logits[:, -batch.input_ids.shape[1] :]
    return logits


@dataclass
class _Sums:
    count: int = 0
    nats: float = 0.0
    kl_nats: float = 0.0
    agreed: int = 0
    correct: int = 0


@dataclass(frozen=True)
class _Targets:
    """Where a batch has something to predict: index into the logits, label, document."""

    index: tuple[Tensor, ...] = field(repr=False)  # each (predictions,)
    labels: Tensor  # (predictions,)
    documents: Tensor  # (predictions,)

    @staticmethod
    def of(batch: Examples, task: Task) -> "_Targets":
        if task == "sequence_classification":
            return _Targets((torch.arange(len(batch)),), batch.labels, batch.documents)
        if task == "masked_lm":
            rows, positions = (batch.labels != -100).nonzero(as_tuple=True)  # each (predictions,)
            labels = batch.labels[rows, positions]
            return _Targets((rows, positions), labels, batch.documents[rows])
        # Position t−1 predicts token t, unless t−1 is padding and has seen nothing.
        wanted = (batch.labels[:, 1:] != -100) & (batch.attention_mask[:, :-1] == 1)
        rows, positions = wanted.nonzero(as_tuple=True)  # each (predictions,)
        labels = batch.labels[rows, positions + 1]
        return _Targets((rows, positions), labels, batch.documents[rows])

    def chunks(self) -> Iterator["_Targets"]:
        for start in range(0, len(self.labels), CHUNK):
            part = slice(start, start + CHUNK)
            index = tuple(axis[part] for axis in self.index)
            yield _Targets(index, self.labels[part], self.documents[part])


def _tally(
    sums: dict[int, _Sums], logits: Tensor, teacher_logits: Tensor | None, targets: _Targets
) -> None:
    if teacher_logits is not None and teacher_logits.shape[-1] != logits.shape[-1]:
        raise MismatchError(
            f"the teacher has {teacher_logits.shape[-1]} outputs and the model {logits.shape[-1]}: "
            "compare models of one vocabulary (or one set of labels)"
        )
    for part in targets.chunks():
        columns = _score(logits, teacher_logits, part)  # (chunk, 4), nats kl agreed correct
        documents, where = torch.unique(part.documents, return_inverse=True)
        totals = torch.zeros(len(documents), 4, dtype=torch.float64)
        totals.index_add_(0, where, columns)
        counts = torch.bincount(where, minlength=len(documents))
        for document, count, row in zip(
            documents.tolist(), counts.tolist(), totals.tolist(), strict=True
        ):
            into = sums.setdefault(document, _Sums())
            into.count += count
            into.nats += row[0]
            into.kl_nats += row[1]
            into.agreed += _whole(row[2])
            into.correct += _whole(row[3])


def _score(logits: Tensor, teacher_logits: Tensor | None, part: _Targets) -> Tensor:
    chosen = logits[tuple(axis.to(logits.device) for axis in part.index)]  # (chunk, vocab)
    log_q = chosen.float().log_softmax(-1)
    labels = part.labels.to(logits.device)
    nats = -log_q.gather(-1, labels[:, None]).squeeze(-1)  # (chunk,)
    best = chosen.argmax(-1)
    correct = best == labels
    if teacher_logits is None:
        kl, agreed = torch.zeros_like(nats), torch.ones_like(correct)
    else:
        theirs = teacher_logits[tuple(axis.to(teacher_logits.device) for axis in part.index)]
        theirs = theirs.to(logits.device)
        log_p = theirs.float().log_softmax(-1)
        p = log_p.exp()
        # 0·log 0 is 0 here: tokens masked out in both models would give NaN.
        kl = (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1)
        agreed = theirs.argmax(-1) == best
    return torch.stack([nats, kl, agreed, correct], dim=-1).double().cpu()


def _quality(name: str, sums: dict[int, _Sums], task: Task) -> Quality:
    if not sums:
        raise DataError(
            "the examples hold nothing to predict: every label is masked; "
            "use longer text, or rows whose answers are not all padding or prompt"
        )
    documents = sorted(sums)
    for document in documents:
        if not (math.isfinite(sums[document].nats) and math.isfinite(sums[document].kl_nats)):
            raise NotFiniteError(
                f"{name} gives NaN or infinite losses in document {document}; look for overflow "
                "in its weights, or measure it in float32"
            )
    ordered = [sums[document] for document in documents]
    return Quality(
        task=task,
        documents=tuple(documents),
        counts=tuple(entry.count for entry in ordered),
        nats=tuple(entry.nats for entry in ordered),
        kl_nats=tuple(entry.kl_nats for entry in ordered),
        agreed=tuple(entry.agreed for entry in ordered),
        correct=tuple(entry.correct for entry in ordered),
    )


def _whole(value: float) -> int:
    # A NaN among the scores is reported once, with its document, when all sums are there.
    return round(value) if math.isfinite(value) else 0
