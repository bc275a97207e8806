"""Losses of distillation, on tensors.

Where a position has a label, position t of the logits answers for token t + 1: `next_labels`
shifts the labels, so that the logits, the largest tensor of a step, are never sliced and copied.
Every loss is a mean over the positions whose (shifted) label is not -100, in nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distribution at each position, by some of its words.

    `ids` and `probabilities` are (rows, length, k), int64 and float32; a word may stand there more
    than once, its probabilities then add up; an unused entry has probability 0. `entropy` (rows,
    length) float32 is that of the whole distribution, in nats.
    """

    ids: Tensor
    probabilities: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's outputs in full: `logits` (rows, length, vocab) or (rows, labels), float32."""

    logits: Tensor


def next_labels(labels: Tensor) -> Tensor:
    """Return labels (rows, length) moved one to the left: entry t is the token after t, or -100."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of −log softmax(z)_label.

    `logits` (…, classes), `labels` (…) already shifted; -100 is left out. 0 where all are.
    """
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)  # (…)
    # logsumexp and one gathered value: log_softmax would write a second tensor as large as logits.
    return _mean(torch.logsumexp(logits, -1) - chosen, labels != IGNORED)


def soft_cross_entropy(
    logits: Tensor, targets: SoftTargets, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean of −Σ_i t_i log softmax(z / T)_i (Hinton 2015, section 2).

    `logits` (rows, length, vocab), `labels` (rows, length) already shifted. Linear in the targets,
    so targets whose expectation is the teacher's distribution give an unbiased gradient.
    """
    scaled = _soften(logits, temperature)
    weights = targets.probabilities
    chosen = (weights * scaled.gather(-1, targets.ids)).sum(-1)  # (rows, length)
    cross = weights.sum(-1) * torch.logsumexp(scaled, -1) - chosen
    return temperature**2 * _mean(cross, labels != IGNORED)


def soft_kl(
    logits: Tensor, targets: SoftTargets, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean KL(teacher ‖ student): the soft cross-entropy less the entropy.

    With drawn targets it is unbiased too, and may fall below zero on a single batch.
    """
    entropy = temperature**2 * _mean(targets.entropy, labels != IGNORED)
    return soft_cross_entropy(logits, targets, labels, temperature) - entropy


def dense_kl(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² times the mean of Σ_i p_i (log p_i − log q_i), p and q softened by T.

    `logits` and `teacher` (…, classes), `labels` (…) already shifted.
    """
    log_p = torch.log_softmax(_soften(teacher, temperature), -1)
    log_q = torch.log_softmax(_soften(logits, temperature), -1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # (…)
    return temperature**2 * _mean(divergence, labels != IGNORED)


def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    targets: SoftTargets | DenseTargets | None,
    *,
    soft_weight: float,
    hard_weight: float,
    temperature: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return soft_weight · KL(teacher ‖ student) · T² + hard_weight · cross-entropy, and both.

    `labels` are already shifted. A part of weight 0 is computed for neither loss nor figures.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    figures: dict[str, float] = {}
    if soft_weight and targets is not None:
        match targets:
            case SoftTargets():
                soft = soft_kl(logits, targets, labels, temperature)
            case DenseTargets(teacher):
                soft = dense_kl(logits, teacher, labels, temperature)
        total = total + soft_weight * soft
        figures["kl_nats"] = soft.item() / temperature**2
    if hard_weight:
        hard = hard_cross_entropy(logits, labels)
        total = total + hard_weight * hard
        figures["cross_entropy_nats"] = hard.item()
    return total, figures


def _soften(logits: Tensor, temperature: float) -> Tensor:
    # Dividing by 1 would cost one more copy of the largest tensor.
    return logits if temperature == 1 else logits / temperature


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    # where and not a product: 0 · NaN of a masked position would be NaN.
    kept = torch.where(mask, values.float(), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)
