"""How far a model's outputs are from what they were, block outputs that did not change reused."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.blocks import find_blocks
from stillroom.errors import DataError
from stillroom.quantization.capture import CalibrationRows


@dataclass(frozen=True)
class _Part:
    """Rows that are run together, and the positions whose logits are looked at."""

    ids: Tensor  # (rows, length)
    mask: Tensor  # (rows, length)
    positions: Tensor  # (kept,), picked in any of the rows
    picked: Tensor  # (rows, kept) bool


def kl_measure(
    model: nn.Module, rows: CalibrationRows, *, tokens: int = 256, batch_size: int = 1
) -> Callable[[Collection[str]], float]:
    """Return a measure of the KL divergence, in nats per token, from the model as it is now.

    It is given the names of the layers that have changed since, and computes nothing before the
    first block that holds one. It is KL(now ‖ then) averaged over up to `tokens` real tokens,
    spread evenly over the rows; of a classifier, over the rows that hold them. What is kept: the
    log-probabilities of now, float32 (tokens, vocabulary), and every block's outputs for the rows,
    (rows, length, hidden) each. `batch_size` is in rows.

    Raises:
        DataError: there are no rows.
    """
    parts = _parts(rows, tokens, batch_size, next(model.parameters()).device)
    prefix, blocks = find_blocks(model)
    model.train(False)
    outputs: list[list[Any]] = []  # by part and block
    now = []
    for part in parts:
        with _recorded(blocks) as recorded:
            now.append(_log_probabilities(model, part))
        outputs.append(recorded)

    def measure(changed: Collection[str]) -> float:
        first = _first_block(prefix, changed)
        total, count = 0.0, 0
        for part, log_p, kept in zip(parts, now, outputs, strict=True):
            with _passed_by(blocks, kept[:first]):
                log_q = _log_probabilities(model, part).double()
            p = log_p.double()
            # Σ (q - p) is zero but for rounding, which it takes out of Σ p (log p - log q): what
            # 8 bits cost is smaller than that. Each term is at least zero.
            total += float((log_q.exp() - p.exp() * (1 + log_q - p)).sum())
            count += len(p)
        return total / count

    return measure


def _first_block(prefix: str, changed: Collection[str]) -> int:
    """Return the number of the first block with a changed layer; 0 if one is outside the blocks."""
    inside = f"{prefix}."
    if not all(name.startswith(inside) for name in changed):
        return 0
    return min((int(name.removeprefix(inside).split(".")[0]) for name in changed), default=0)


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[Any]]:
    """Give a list that gets each block's outputs when it computes."""
    outputs: list[Any] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
        for block in blocks
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _passed_by(blocks: nn.ModuleList, outputs: list[Any]) -> Iterator[None]:
    """Let the first blocks return `outputs` instead of computing them."""

    def returning(output: Any) -> Callable[..., Any]:
        # A copy: the block behind it may add to its input in place.
        return lambda *_, **__: (
            tuple(each.clone() if isinstance(each, Tensor) else each for each in output)
            if isinstance(output, tuple)
            else output.clone()
        )

    skipped = list(blocks)[: len(outputs)]
    try:
        for block, output in zip(skipped, outputs, strict=True):
            setattr(block, "forward", returning(output))  # noqa: B010 - mypy
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def _parts(
    rows: CalibrationRows, tokens: int, batch_size: int, device: torch.device
) -> list[_Part]:
    mask = rows.attention_mask.bool()
    if not int(mask.sum()):
        raise DataError(
            "measuring what layers lose needs calibration rows: there are none; add text"
        )
    stride = -(-int(mask.sum()) // tokens)
    counted = mask.flatten().cumsum(0).view_as(mask)  # from 1, over real tokens
    picked = mask & (counted % stride == 0)
    parts = []
    for chosen in torch.split(torch.arange(len(mask)), batch_size):
        positions = picked[chosen].any(0).nonzero()[:, 0]
        if len(positions):
            values = (
                rows.input_ids[chosen],
                rows.attention_mask[chosen],
                positions,
                picked[chosen][:, positions],
            )
            parts.append(_Part(*(value.to(device) for value in values)))
    return parts


@torch.no_grad()
def _log_probabilities(model: nn.Module, part: _Part) -> Tensor:
    """Return log-probabilities, (tokens or rows, vocabulary or labels) float32."""
    arguments = forward_arguments(model, part.ids, part.mask)
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    keeps = "logits_to_keep" in accepted
    if keeps:
        # The head runs at these positions only: logits of all would be the largest tensor of all.
        arguments["logits_to_keep"] = part.positions
    logits: Tensor = model(**arguments).logits
    if logits.dim() == 3:
        logits = (logits if keeps else logits[:, part.positions])[part.picked]
    return logits.float().log_softmax(-1)


def forward_arguments(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return what a model is called with for rows, (rows, length), whatever its kind."""
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
        arguments["decoder_attention_mask"] = mask
    return arguments
