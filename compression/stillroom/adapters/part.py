"""What every method of adapting shares: it is worn by rows of a batch, through hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillroom.adapters.routing import Rows
from stillroom.errors import SourceError


class Part(nn.Module):
    """What a method puts on a base: parameters of its own, and hooks on the base's modules.

    The base's own parameters never change, and its module tree only while a part is worn.
    `alone`: rows that wear it need a forward pass of their own. `rows` says who wears it now.
    """

    alone = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: Rows = False
        self._hooks: list[RemovableHandle] = []

    def wear(self, rows: Rows) -> None:
        """Have these rows of each batch go through it, until the next call."""
        self.rows = rows

    def detach(self) -> None:
        """Take it off the base for good."""
        self.wear(False)
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """Return what is to be saved, by name."""
        return dict(self.state_dict())

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Take the values that were saved.

        Raises:
            SourceError: they are of other names or shapes.
        """
        own = self.tensors()
        shapes = [{name: tuple(t.shape) for name, t in each.items()} for each in (own, tensors)]
        if shapes[0] != shapes[1]:
            odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
            raise SourceError(
                f"the adapter's tensors do not fit the base: expected {len(own)}, {len(tensors)} "
                f"came; they differ in {', '.join(f'{name} {shape}' for name, shape in odd[:4])}"
            )
        for name, value in own.items():
            value.copy_(tensors[name])

    def hook(self, module: nn.Module, call: Callable[..., Any], **options: Any) -> None:
        """Call `call` after each forward pass of `module`, as torch's forward hooks are.

        It is a method of this part, or a `partial` of one: of a closure, a copy of the model would
        call the original's.
        """
        self._hooks.append(module.register_forward_hook(call, **options))

    def hook_before(self, module: nn.Module, call: Callable[..., Any], **options: Any) -> None:
        """Call `call` before each forward pass of `module`."""
        self._hooks.append(module.register_forward_pre_hook(call, **options))


@contextmanager
def unhooked_on_failure(base: nn.Module) -> Iterator[None]:
    """Have no hook stay on `base` that was put there before an error."""
    hooks = [
        each
        for module in base.modules()
        for name, each in vars(module).items()
        if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
    ]
    before = [set(each) for each in hooks]
    try:
        yield
    except BaseException:
        for each, kept in zip(hooks, before, strict=True):
            for number in set(each) - kept:
                del each[number]
        raise
