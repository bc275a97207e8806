"""Train a student on what the teacher said, and on the text."""

from dataclasses import dataclass

from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints
from stillroom.data.examples import Examples
from stillroom.distillation.cache_files import TeacherCache
from stillroom.distillation.losses import (
    DenseTargets,
    Divergence,
    SoftTargets,
    hidden_cosine,
    mixed_loss,
    soft_loss,
)
from stillroom.errors import MismatchError, RecipeError
from stillroom.fine_tuning import aligned_labels, fine_tune, held_out, measure, model_output
from stillroom.progress import Progress, silent
from stillroom.training.batches import Batch
from stillroom.training.history import HELD_OUT_KL, TrainingHistory
from stillroom.training.loop import HeldOut, train
from stillroom.training.options import TrainingOptions


@dataclass(frozen=True)
class Taught:
    """Rows with what the teacher said of them, where it was asked."""

    examples: Examples
    cache: TeacherCache | None = None


@dataclass(frozen=True)
class DistillationOptions:
    """Weights of the three parts of the loss, the temperature of both models, and the loop.

    The loss is soft_weight · T² · divergence(teacher, student) + hard_weight · cross-entropy +
    cosine_weight · (1 − cosine of the last hidden states). Other divergences than "kl" and
    "cross_entropy" need a dense cache, the cosine one with hidden states.
    """

    training: TrainingOptions
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "kl"
    cosine_weight: float = 0.0


def distill(
    student: nn.Module,
    rows: Taught,
    options: DistillationOptions,
    *,
    evaluation: Taught | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Train `student` in place on the cached targets of `rows`; return its curves.

    Without targets the cross-entropy alone is minimised: the control of a distillation. Rows for
    `evaluation` are measured by cross-entropy while training, and where there are targets of them
    by the divergence from the teacher, too, which early stopping then goes by.

    Raises:
        MismatchError: a cache belongs to other rows, another tokenizer, temperature or
            vocabulary; or a checkpoint to another run.
        RecipeError: all weights are 0; the divergence cannot be taken from this cache.
        what `stillroom.training.loop.train` raises.
    """
    examples, cache = rows.examples, rows.cache
    if cache is None:
        return fine_tune(
            student,
            examples,
            options.training,
            evaluation=None if evaluation is None else evaluation.examples,
            checkpoints=checkpoints,
            fingerprint=fingerprint,
            progress=progress,
        )
    if options.soft_weight + options.hard_weight + options.cosine_weight <= 0:
        raise RecipeError("soft_weight, hard_weight and cosine_weight are 0: give one a weight")
    cache.check(examples, options.temperature)
    loss = _CachedTeacherLoss(cache, options)
    weights = (
        f"soft {options.soft_weight} hard {options.hard_weight} T {options.temperature} "
        f"{options.divergence} cosine {options.cosine_weight}"
    )
    return train(
        student,
        examples,
        loss,
        options.training,
        held_out=_held_out(evaluation, options),
        checkpoints=checkpoints,
        fingerprint=f"{fingerprint} {weights}",
        progress=progress,
    )


def _held_out(evaluation: Taught | None, options: DistillationOptions) -> HeldOut | None:
    rows = options.training.batch_rows
    if evaluation is None or len(evaluation.examples) == 0:
        return None
    examples, cache = evaluation.examples, evaluation.cache
    if cache is None:
        return held_out(examples, rows)
    cache.check(examples, options.temperature)

    def divergence(batch: Batch, logits: Tensor) -> dict[str, float]:
        targets = _targets(cache, batch, logits)
        labels, temperature = aligned_labels(batch), options.temperature
        nats = soft_loss(logits, targets, labels, "kl", temperature).item() / temperature**2
        return {HELD_OUT_KL: nats}

    return HeldOut(lambda model: measure(model, examples, rows, divergence), watch=HELD_OUT_KL)


@dataclass(frozen=True)
class _CachedTeacherLoss:
    cache: TeacherCache
    options: DistillationOptions

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with_hidden = self.options.cosine_weight > 0
        output = model_output(model, batch, hidden_states=with_hidden)
        logits = output.logits
        loss, figures = mixed_loss(
            logits,
            aligned_labels(batch),
            _targets(self.cache, batch, logits),
            soft_weight=self.options.soft_weight,
            hard_weight=self.options.hard_weight,
            temperature=self.options.temperature,
            divergence=self.options.divergence,
        )
        if with_hidden:
            hidden = self.cache.hidden(batch.rows)[:, : batch.length].to(logits.device)
            cosine = hidden_cosine(output.hidden_states[-1], hidden, batch.attention_mask)
            cosine = cosine * batch.token_weight
            loss = loss + self.options.cosine_weight * cosine
            figures["hidden_cosine_distance"] = cosine.item()
        return loss, figures


def _targets(cache: TeacherCache, batch: Batch, logits: Tensor) -> SoftTargets | DenseTargets:
    """Return the teacher's targets of the batch, where the student's logits are.

    Raises:
        MismatchError: the student has another number of words or labels.
    """
    vocabulary = cache.facts.vocabulary
    if logits.shape[-1] != vocabulary:
        raise MismatchError(
            f"the teacher cache has {vocabulary} words or labels, the student "
            f"{logits.shape[-1]}; a student learns from a teacher with the same ones"
        )
    match cache.targets(batch.rows):
        case DenseTargets(teacher):
            return DenseTargets(
                (teacher[:, : batch.length] if teacher.dim() == 3 else teacher).to(logits.device)
            )
        case SoftTargets(ids, probabilities, entropy):
            parts = (ids, probabilities, entropy)
            return SoftTargets(*(part[:, : batch.length].to(logits.device) for part in parts))
