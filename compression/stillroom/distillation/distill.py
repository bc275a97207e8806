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
)
from stillroom.errors import MismatchError, RecipeError
from stillroom.fine_tuning import aligned_labels, fine_tune, held_out, model_output
from stillroom.progress import Progress, silent
from stillroom.training.history import TrainingHistory
from stillroom.training.loop import Batch, train
from stillroom.training.options import TrainingOptions


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
    examples: Examples,
    cache: TeacherCache | None,
    options: DistillationOptions,
    *,
    evaluation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Train `student` in place on the cached targets of `examples`; return its curves.

    Without a cache the cross-entropy alone is minimised: the control of a distillation. Rows for
    `evaluation` are measured by cross-entropy while training.

    Raises:
        MismatchError: the cache belongs to other rows, another tokenizer, temperature or
            vocabulary; or a checkpoint to another run.
        RecipeError: all weights are 0; the divergence cannot be taken from this cache.
        what `stillroom.training.loop.train` raises.
    """
    if cache is None:
        return fine_tune(
            student,
            examples,
            options.training,
            evaluation=evaluation,
            checkpoints=checkpoints,
            fingerprint=fingerprint,
            progress=progress,
        )
    if options.soft_weight + options.hard_weight + options.cosine_weight <= 0:
        raise RecipeError("soft_weight, hard_weight and cosine_weight are 0: give one a weight")
    cache.check(examples, options.temperature)
    weights = (
        f"soft {options.soft_weight} hard {options.hard_weight} T {options.temperature} "
        f"{options.divergence} cosine {options.cosine_weight}"
    )
    return train(
        student,
        examples,
        _CachedTeacherLoss(cache, options),
        options.training,
        evaluate=held_out(evaluation, options.training.batch_rows),
        checkpoints=checkpoints,
        fingerprint=f"{fingerprint} {weights}",
        progress=progress,
    )


@dataclass(frozen=True)
class _CachedTeacherLoss:
    cache: TeacherCache
    options: DistillationOptions

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with_hidden = self.options.cosine_weight > 0
        output = model_output(model, batch, hidden_states=with_hidden)
        logits = output.logits
        vocabulary = self.cache.facts.vocabulary
        if logits.shape[-1] != vocabulary:
            raise MismatchError(
                f"the teacher cache has {vocabulary} words or labels, the student "
                f"{logits.shape[-1]}; a student learns from a teacher with the same ones"
            )
        loss, figures = mixed_loss(
            logits,
            aligned_labels(batch),
            _on_device(self.cache.targets(batch.rows), logits),
            soft_weight=self.options.soft_weight,
            hard_weight=self.options.hard_weight,
            temperature=self.options.temperature,
            divergence=self.options.divergence,
        )
        if with_hidden:
            hidden = self.cache.hidden(batch.rows).to(logits.device)
            cosine = hidden_cosine(output.hidden_states[-1], hidden, batch.attention_mask)
            loss = loss + self.options.cosine_weight * cosine
            figures["hidden_cosine_distance"] = cosine.item()
        return loss, figures


def _on_device(targets: SoftTargets | DenseTargets, like: Tensor) -> SoftTargets | DenseTargets:
    match targets:
        case DenseTargets(logits):
            return DenseTargets(logits.to(like.device))
        case SoftTargets(ids, probabilities, entropy):
            device = like.device
            return SoftTargets(ids.to(device), probabilities.to(device), entropy.to(device))
