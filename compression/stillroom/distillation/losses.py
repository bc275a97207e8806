"""Losses of distillation, on tensors.

Where a position has a label, position t of the logits answers for token t + 1: `next_labels`
shifts the labels, so that the logits, the largest tensor of a step, are never sliced and copied.
Every loss is a mean over the positions whose (shifted) label is not -100, in nats.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stillroom.distillation.chosen_words import cross_entropy_of_words
from stillroom.errors import MismatchError, RecipeError

IGNORED = -100
Divergence = Literal["kl", "cross_entropy", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's distribution at each position, by some of its words.

    `ids` and `probabilities` are (rows, length, k), int64 and float32; a word may stand there more
    than once, its probabilities then add up; an unused entry has probability 0. `entropy` (rows,
    length) float32, in nats, is that of the distribution they stand for: drawn ones for the whole,
    top-k ones for themselves.
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
    known = labels != IGNORED
    ids = labels.clamp(min=0).unsqueeze(-1)
    return _mean(cross_entropy_of_words(logits, ids, known.float().unsqueeze(-1)), known)


def soft_cross_entropy(
    logits: Tensor, targets: SoftTargets, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean of −Σ_i t_i log softmax(z / T)_i (Hinton 2015, section 2).

    `logits` (rows, length, vocab), `labels` (rows, length) already shifted. Linear in the targets,
    so targets whose expectation is the teacher's distribution give an unbiased gradient.
    """
    known = labels != IGNORED
    weights = torch.where(known.unsqueeze(-1), targets.probabilities, 0.0)
    cross = cross_entropy_of_words(logits, targets.ids, weights, temperature)  # (rows, length)
    return temperature**2 * _mean(cross, known)


def soft_kl(
    logits: Tensor, targets: SoftTargets, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean KL(teacher ‖ student): the soft cross-entropy less the entropy.

    With drawn targets it is unbiased too, and may fall below zero on a single batch. From top-k
    targets it is the divergence of these: a student like the teacher has −log of the kept mass.
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


def dense_cross_entropy(
    logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean of −Σ_i p_i log q_i. Shapes as in `dense_kl`."""
    p = torch.softmax(_soften(teacher, temperature), -1)
    log_q = torch.log_softmax(_soften(logits, temperature), -1)
    return temperature**2 * _mean(-(p * log_q).sum(-1), labels != IGNORED)


def reverse_kl(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² times the mean of Σ_i q_i (log q_i − log p_i): KL(student ‖ teacher).

    It seeks a mode of the teacher where `dense_kl` covers all of them (Gu et al. 2023, MiniLLM,
    section 2.1). Shapes as in `dense_kl`.
    """
    return dense_kl(teacher, logits, labels, temperature)


def jensen_shannon(
    logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return T² times the mean of ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2.

    At most T² log 2 (Lin 1991; in distillation Agarwal et al. 2023, GKD). Shapes as in `dense_kl`.
    """
    log_p = torch.log_softmax(_soften(teacher, temperature), -1)
    log_q = torch.log_softmax(_soften(logits, temperature), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return temperature**2 * _mean(halves.sum(-1) / 2, labels != IGNORED)


def soft_loss(
    logits: Tensor,
    targets: SoftTargets | DenseTargets,
    labels: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Tensor:
    """Return the mean divergence of the student from the teacher's targets, times T².

    Raises:
        RecipeError: the divergence needs the teacher's whole distribution, and the targets hold
            some words of it only.
    """
    match targets, divergence:
        case SoftTargets(), "kl":
            return soft_kl(logits, targets, labels, temperature)
        case SoftTargets(), "cross_entropy":
            return soft_cross_entropy(logits, targets, labels, temperature)
        case SoftTargets(), _:
            raise RecipeError(
                f"distillation.divergence: {divergence} is not linear in the teacher's "
                "probabilities, and drawn ones would bias it; set distillation.cache.kind to "
                "dense, or take kl"
            )
        case DenseTargets(teacher), "kl":
            return dense_kl(logits, teacher, labels, temperature)
        case DenseTargets(teacher), "cross_entropy":
            return dense_cross_entropy(logits, teacher, labels, temperature)
        case DenseTargets(teacher), "reverse_kl":
            return reverse_kl(logits, teacher, labels, temperature)
        case DenseTargets(teacher), _:
            return jensen_shannon(logits, teacher, labels, temperature)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of 1 − cos(h_s, h_t) over real tokens (DistilBERT, section 3).

    Args:
        student: (rows, length, hidden), the student's last hidden states.
        teacher: the same of the teacher.
        mask: (rows, length), 1 or True at real tokens.

    Raises:
        MismatchError: the two have different widths.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise MismatchError(
            f"the cosine of hidden states needs a student as wide as its teacher: "
            f"{student.shape[-1]} came, the teacher has {teacher.shape[-1]}; "
            "set cosine_weight to 0, or keep hidden_size"
        )
    cosine = torch.nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return _mean(1 - cosine, mask.bool())


def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    targets: SoftTargets | DenseTargets | None,
    *,
    soft_weight: float,
    hard_weight: float,
    temperature: float,
    divergence: Divergence = "kl",
) -> tuple[Tensor, dict[str, float]]:
    """Return soft_weight · T² · divergence + hard_weight · cross-entropy, and both parts.

    `labels` are already shifted. A part of weight 0 is computed for neither loss nor figures.

    Raises:
        RecipeError: the divergence cannot be taken from these targets.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    figures: dict[str, float] = {}
    if soft_weight and targets is not None:
        soft = soft_loss(logits, targets, labels, divergence, temperature)
        total = total + soft_weight * soft
        name = "soft_cross_entropy" if divergence == "cross_entropy" else divergence
        figures[f"{name}_nats"] = soft.item() / temperature**2
    if hard_weight:
        hard = hard_cross_entropy(logits, labels)
        total = total + hard_weight * hard
        figures["cross_entropy_nats"] = hard.item()
    return total, figures


def _soften(logits: Tensor, temperature: float) -> Tensor:
    # A bfloat16's 8 bits are too few for differences of logarithms. What is wide enough is not
    # copied, nor divided by 1: logits are the largest tensor of a step.
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact if temperature == 1 else exact / temperature


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    # where and not a product: 0 · NaN of a masked position would be NaN.
    kept = torch.where(mask, values.float(), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)
