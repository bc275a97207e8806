"""Changing rows where a layer may see the tokens of all rows in one dimension."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.part import Part
from stillroom.adapters.places import adaptable_stacks
from stillroom.adapters.probe import short_pass
from stillroom.adapters.routing import Rows, change_rows

# So that as many tokens as rows, or all, do not fall to each expert by chance.
_ROWS, _LENGTH = 2, 7


class BatchRows:
    """How many rows the batch has that goes through the blocks; OPT's layers do not show it."""

    def __init__(self, part: Part, base: nn.Module) -> None:
        self.count = 0
        for blocks in adaptable_stacks(base).values():
            for block in blocks:
                part.hook_before(block, self._note, with_kwargs=True)

    def change(
        self, rows: Rows, output: Tensor, new: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor:
        """Return `output` (batch, …) or (batch · length, …) with `new` of the rows that wear it.

        `new` gets the outputs, and the layer's `inputs`, of those rows, and returns as many
        outputs, of any dtype.
        """
        if isinstance(rows, bool):
            return new(output, *inputs).to(output.dtype) if rows else output
        by_row = [self._by_row(each) for each in (output, *inputs)]
        changed = change_rows(rows, by_row[0], lambda which: new(*(each[which] for each in by_row)))
        return changed.view(output.shape)

    def _by_row(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.count, -1, tensor.shape[-1]) if tensor.dim() == 2 else tensor

    def _note(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else options["hidden_states"]
        self.count = len(hidden)


def sees_rows(base: Any, names: Iterable[str]) -> bool:
    """Return whether each of these modules of `base` gives (batch, …) or (batch · length, …).

    What positions share gives nothing of a row, and an expert some tokens of some rows.
    """
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}

    def note(seen: list[torch.Size], _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output.shape)

    hooks = [
        base.get_submodule(name).register_forward_hook(partial(note, seen))
        for name, seen in shapes.items()
    ]
    words = base.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_ROWS * _LENGTH) * 7 + 3) % words
    try:
        short_pass(base, ids.view(_ROWS, _LENGTH))
    finally:
        for hook in hooks:
            hook.remove()
    return all(seen and all(map(_is_by_row, seen)) for seen in shapes.values())


def _is_by_row(shape: torch.Size) -> bool:
    return shape[0] == _ROWS or (len(shape) == 2 and shape[0] == _ROWS * _LENGTH)
