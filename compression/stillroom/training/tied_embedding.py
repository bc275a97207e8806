"""The gradient of embeddings that are the head's weights too, without a second dense matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.training.team import Team


@dataclass(frozen=True)
class Lookups:
    """Rows of the embeddings that forward passes have looked up, until their gradient is added."""

    embedding: nn.Embedding | None
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids (batch, length), and the rows (batch, length, hidden) as the model got them."""

    def add_gradient(self) -> None:
        """Add to the gradient, which a backward pass left of the head, that of the lookups."""
        if self.embedding is None:
            return
        weight = self.embedding.weight
        with torch.no_grad():
            for ids, rows in self.seen:
                if rows.grad is None:
                    continue
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                numbers, gradient = ids.flatten(), rows.grad.flatten(0, -2)
                if self.embedding.padding_idx is not None:
                    real = numbers != self.embedding.padding_idx
                    numbers, gradient = numbers[real], gradient[real]
                weight.grad.index_add_(0, numbers, gradient)
        self.seen.clear()


@contextmanager
def apart_from_the_head(team: Team) -> Iterator[Lookups]:
    """Keep the lookups of tied embeddings out of autograd, whose sum `add_gradient` completes.

    Autograd makes a (vocabulary, hidden) matrix of zeros for the few rows that were looked up, and
    a third one for its sum with the head's: a tenth of a CPU's step of a small model. Where the
    embeddings are not tied, or not of this process alone on a CPU, nothing is changed.
    """
    embedding = _tied(team)
    lookups = Lookups(embedding)
    if embedding is None:
        yield lookups
        return

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            return None
        rows = output.detach().requires_grad_()
        lookups.seen.append((arguments[0], rows))
        return rows

    handle = embedding.register_forward_hook(hook)
    try:
        yield lookups
    finally:
        handle.remove()


def _tied(team: Team) -> nn.Embedding | None:
    model = team.module
    # On other devices the sum over equal ids comes in any order; other processes want it whole.
    if team.size > 1 or not isinstance(model, PreTrainedModel) or model.device.type != "cpu":
        return None
    whole: Any = model
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if type(embedding) is not nn.Embedding or head is None or head.weight is not embedding.weight:
        return None
    scaled = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    if scaled or embedding._forward_hooks or not embedding.weight.requires_grad:
        return None
    return embedding
