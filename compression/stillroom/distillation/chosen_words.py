"""Cross-entropy against a few words a position, in one pass over the logits each way.

The logits are the largest tensors of a step: 100 MB for 512 positions of 49,152 words. Autograd
would read and write several more of their size; here the gradient alone is written.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Logits that are worked on at once on a CPU: few enough to stay in its cache."""


def cross_entropy_of_words(
    logits: Tensor, ids: Tensor, weights: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return −Σ_k w_k log softmax(z / T)_{i_k} of each position, (…) float32.

    Args:
        logits: (…, vocab), in any float format; summed in float32 (float64 stays).
        ids: (…, k) int64, the words; one may stand there more than once.
        weights: (…, k) float32, which get no gradient. A position whose weights are all 0 gets 0,
            and no gradient, even where its logits are not finite.
        temperature: T, above 0.
    """
    flat: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), ids.flatten(0, -2), weights.flatten(0, -2), temperature
    )
    return flat.reshape(logits.shape[:-1])


class _CrossEntropy(torch.autograd.Function):
    """The same of logits (positions, vocab)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, weights: Tensor, temperature: float
    ) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        normalisers = logits.new_empty(len(logits), dtype=exact)
        losses = torch.empty_like(normalisers)
        total = weights.sum(-1)
        for here in _chunks(logits):
            part = logits[here].to(exact)
            part = part if temperature == 1 else part / temperature
            normalisers[here] = torch.logsumexp(part, -1)
            chosen = (weights[here] * part.gather(-1, ids[here])).sum(-1)
            losses[here] = total[here] * normalisers[here] - chosen
        ctx.save_for_backward(logits, ids, weights, normalisers, total)
        ctx.temperature = temperature
        return losses.masked_fill_(total == 0, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, weights, normalisers, total = ctx.saved_tensors
        temperature: float = ctx.temperature
        gradient = torch.empty_like(logits)
        unused = (total == 0).unsqueeze(-1)
        scale = scale.unsqueeze(-1) / temperature
        for here in _chunks(logits):
            # scale · (Σ w · softmax(z / T) − w at the words), made where it is to stand.
            place = gradient[here] if logits.dtype == normalisers.dtype else None
            part, normaliser = logits[here], normalisers[here].unsqueeze(-1)
            if temperature != 1:
                part = torch.div(part.to(normalisers.dtype), temperature, out=place)
            part = torch.sub(part, normaliser, out=place)
            part.exp_().mul_(scale[here] * total[here].unsqueeze(-1))
            part.scatter_add_(-1, ids[here], (-scale[here] * weights[here]).to(part.dtype))
            part.masked_fill_(unused[here], 0.0)
            if place is None:
                gradient[here] = part
        return gradient, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    positions, vocabulary = logits.shape
    rows = max(1, CHUNK // vocabulary) if logits.device.type == "cpu" else max(1, positions)
    return [slice(start, start + rows) for start in range(0, positions, rows)]
