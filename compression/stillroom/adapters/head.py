"""A classifier's head of an adapter's own: the base's stays as it is."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from stillroom.adapters.copies import dense_copy
from stillroom.adapters.part import Part
from stillroom.adapters.places import head_modules
from stillroom.adapters.routing import change_rows


class TrainedHead(Part):
    """Copies of a classifier's head modules, which stand in for them where they are worn.

    They compute in float32 whatever the base's dtype is, and so are the logits where all rows of a
    batch wear them.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.copies = nn.ModuleDict()
        for name, module in head_modules(base).items():
            self.copies[name] = dense_copy(module).float()
            self.hook(module, partial(self._replace, name), with_kwargs=True)

    def _replace(
        self,
        name: str,
        _: nn.Module,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        own = self.copies[name]
        hidden = inputs[0] if inputs else next(iter(options.values()))
        hidden = hidden.to(next(own.parameters()).dtype)
        changed = change_rows(self.rows, output, lambda which: own(hidden[which]))
        # The base's next module reads its own dtype; the last's logits stay as exact as they are.
        return changed if name == list(self.copies)[-1] else changed.to(output.dtype)
