"""Changing rows where a layer may see the tokens of all rows in one dimension."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stillroom.adapters.part import Part
from stillroom.adapters.places import adaptable_stacks
from stillroom.adapters.routing import Rows, change_rows


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
