"""Which base an adapter belongs to: its architecture, its shape, and what it computes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.adapters.places import adaptable_stacks
from stillroom.adapters.probe import short_pass
from stillroom.errors import MismatchError

PROBED = 64  # hidden values that are kept
TOKENS = 8
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class BaseIdentity:
    """What is told of a base without its weights.

    `probe` are hidden values that it computes of fixed tokens, over the largest: they are the same
    for a layer that is kept quantized and its dense form, and others for another revision.
    """

    architecture: str
    shape: dict[str, int]
    dtype: str
    probe: tuple[float, ...]


@torch.no_grad()
def identify(base: Any) -> BaseIdentity:
    """Return the identity of a base that wears no adapter."""
    embeddings = base.get_input_embeddings().weight  # (vocab, hidden)
    shape = {
        "vocabulary": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "layers": sum(len(blocks) for blocks in adaptable_stacks(base).values()),
    }
    ids = (torch.arange(TOKENS) * 7 + 3) % shape["vocabulary"]
    hidden: Tensor = short_pass(base, ids[None])[0].float().flatten()  # (tokens · hidden,)
    kept = hidden[:: max(len(hidden) // PROBED, 1)][:PROBED] / hidden.abs().max()
    return BaseIdentity(
        architecture=str(base.config.model_type),
        shape=shape,
        dtype=str(base.dtype).removeprefix("torch."),
        probe=tuple(round(value, 6) for value in kept.tolist()),
    )


def require_same_base(trained_on: BaseIdentity, here: BaseIdentity, what: str) -> None:
    """Refuse a base that the adapter `what` was not trained on.

    Raises:
        MismatchError: it is another architecture, another shape or another revision.
    """
    if trained_on.architecture != here.architecture:
        raise MismatchError(
            f"{what} belongs to another base: it was trained on a {trained_on.architecture}, a "
            f"{here.architecture} came; load the base it was trained on"
        )
    for name, expected in trained_on.shape.items():
        if here.shape[name] != expected:
            raise MismatchError(
                f"{what} belongs to a base of another shape: it was trained with {name} "
                f"{expected}, {here.shape[name]} came; load the base it was trained on"
            )
    pairs = zip(trained_on.probe, here.probe, strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    tolerance = max(_tolerance(trained_on.dtype), _tolerance(here.dtype))
    # Written so that a probe that is no number is refused too.
    if not difference <= tolerance:
        raise MismatchError(
            f"{what} belongs to another revision of its base: hidden values of the same tokens "
            f"differ by {difference:.3g} of the largest, at most {tolerance:g} was expected; load "
            "the revision it was trained on"
        )


def _tolerance(dtype: str) -> float:
    return TOLERANCE.get(getattr(torch, dtype), HALF_TOLERANCE)
