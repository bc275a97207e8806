"""What each block of a model is called with, and what each of its linear layers sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import StageError
from stillroom.quantization.hessian import HessianAccumulator


class _Stop(Exception):
    """It ends a forward pass that has shown enough."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's hidden states, (rows, length, hidden)."""
        output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass
class Batch:
    """Calibration rows on their way through the blocks."""

    hidden: Tensor  # (rows, length, hidden), the input of the next block
    mask: Tensor  # (rows, length) bool, true at real tokens
    calls: list[BlockCall] = field(default_factory=list)  # one a block


def capture(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, mask: Tensor) -> Batch:
    """Return what reaches the first block for these rows, and how each block is called.

    `ids` and `mask` are (rows, length). Only the first block computes: the others are passed by,
    for their masks and position embeddings, which may differ from block to block.
    """
    batch = Batch(hidden=torch.empty(0), mask=mask.bool())
    first: dict[str, Any] = {}

    def stand_in(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            batch.calls.append(BlockCall(args[1:], rest))
            if index == 0:
                batch.hidden = args[0] if args else kwargs["hidden_states"]
            if index == len(blocks) - 1:
                raise _Stop
            if index == 0:
                first["output"] = original(*args, **kwargs)
            return first["output"]

        return forward

    with _without_cache(model), _replaced_forwards(blocks, stand_in):
        _run_until_stop(lambda: model(input_ids=ids, attention_mask=mask))
    return batch


def input_groups(
    block: nn.Module, index: int, linears: dict[str, nn.Module], batch: Batch
) -> list[list[str]]:
    """Return the names of the layers that are called, those with the same input together.

    The groups stand in the order in which they get their inputs. Layers share an input if they
    are given the very same tensors, call by call.
    """
    inputs: list[Tensor] = []  # kept, so that no two have the same identity
    calls: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: Tensor) -> None:
        place = next((i for i, other in enumerate(inputs) if other is value), len(inputs))
        if place == len(inputs):
            inputs.append(value)
        calls[name] = (*calls.get(name, ()), place)

    with _watched(linears, see):
        batch.calls[index].run(block, batch.hidden)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, places in calls.items():
        groups.setdefault(places, []).append(name)
    return list(groups.values())


def collect_hessians(
    block: nn.Module, index: int, watched: dict[str, nn.Module], batches: list[Batch]
) -> dict[str, Tensor]:
    """Return H = 2 X Xᵀ / tokens, (in, in), of each watched layer over all batches.

    Padding does not count. A layer that got no token is left out.
    """
    sums: dict[str, HessianAccumulator] = {}
    for batch in batches:

        def add(name: str, value: Tensor, mask: Tensor = batch.mask) -> None:
            tokens = value[mask] if value.shape[:2] == mask.shape else value.flatten(0, -2)
            sums.setdefault(name, HessianAccumulator(value.shape[-1])).add(tokens)

        with _watched(watched, add):
            batch.calls[index].run(block, batch.hidden)
    found = {name: total.hessian() for name, total in sums.items()}
    return {name: H for name, H in found.items() if H is not None}


@contextmanager
def _watched(linears: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, input) before each of the layers computes."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0])

    hooks = [linear.register_forward_pre_hook(hook_for(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaced_forwards(
    blocks: nn.ModuleList, stand_in: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    originals = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            setattr(block, "forward", stand_in(index, block.forward))  # noqa: B010 - mypy
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            del block.__dict__["forward"]
            if original is not None:
                block.__dict__["forward"] = original


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keep the model from filling a key-value cache that nobody reads."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


def _run_until_stop(forward: Callable[[], object]) -> None:
    try:
        forward()
    except _Stop:
        return
    raise StageError("the model returned without calling its last block")
