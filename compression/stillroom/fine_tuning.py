"""Training on labels alone: the teacher's own task, the control of distillation, adapters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints
from stillroom.data.examples import Examples
from stillroom.distillation.losses import IGNORED, hard_cross_entropy, next_labels
from stillroom.progress import Progress, silent
from stillroom.training.batches import Batch
from stillroom.training.history import HELD_OUT_LOSS, TrainingHistory
from stillroom.training.loop import HeldOut, train
from stillroom.training.options import TrainingOptions

Figures = Callable[[Batch, Tensor], dict[str, float]]


def fine_tune(
    model: nn.Module,
    examples: Examples,
    options: TrainingOptions,
    *,
    evaluation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Train `model` in place on the labels of `examples` by cross-entropy.

    Raises:
        what `stillroom.training.loop.train` raises.
    """
    return train(
        model,
        examples,
        cross_entropy,
        options,
        held_out=held_out(evaluation, options.batch_rows),
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        progress=progress,
    )


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return the cross-entropy of the model on the batch's labels, in nats a prediction."""
    loss = hard_cross_entropy(output_logits(model, batch), aligned_labels(batch))
    return loss, {"cross_entropy_nats": loss.item()}


def output_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits, (batch, length, vocab) or (batch, labels)."""
    logits: Tensor = model_output(model, batch).logits
    return logits


def model_output(model: nn.Module, batch: Batch, *, hidden_states: bool = False) -> Any:
    """Return what the model makes of the batch: `logits`, and `hidden_states` where asked for."""
    # A decoder in training would fill a key-value cache that nobody reads.
    options = {"use_cache": False} if batch.is_causal else {}
    if hidden_states:
        options["output_hidden_states"] = True
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)


def aligned_labels(batch: Batch) -> Tensor:
    """Return the labels that the logits answer for, place by place."""
    return next_labels(batch.labels) if batch.is_causal else batch.labels


def held_out(examples: Examples | None, batch_rows: int) -> HeldOut | None:
    """Return how a model is measured on `examples`; None where there are none."""
    if examples is None or len(examples) == 0:
        return None
    return HeldOut(lambda model: measure(model, examples, batch_rows))


@torch.no_grad()
def measure(
    model: nn.Module, examples: Examples, batch_rows: int, further: Figures | None = None
) -> dict[str, float]:
    """Return the mean cross-entropy in nats, and the accuracy, over all labels of `examples`.

    `further` adds figures: of a batch and its logits (batch, length, vocab) or (batch, labels) it
    returns means over the batch's predictions.
    """
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0
    for start in range(0, len(examples), batch_rows):
        rows = torch.arange(start, min(start + batch_rows, len(examples)))
        batch = Batch.of(examples, rows, device)
        logits, labels = output_logits(model, batch), aligned_labels(batch)
        predictions = batch.predictions
        hits = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()
        figures = {
            HELD_OUT_LOSS: hard_cross_entropy(logits, labels).item(),
            "held_out_accuracy": int(hits) / max(predictions, 1),
        }
        if further is not None:
            figures |= further(batch, logits)
        for name, figure in figures.items():
            sums[name] = sums.get(name, 0.0) + figure * predictions
        count += predictions
    return {name: total / max(count, 1) for name, total in sums.items()}
