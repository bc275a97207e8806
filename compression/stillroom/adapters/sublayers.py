"""Where the sublayers of each block end, seen in one short forward pass instead of in names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from stillroom.adapters.places import adaptable_linears, adaptable_stacks
from stillroom.adapters.probe import short_pass
from stillroom.errors import RecipeError

# What mixes the tokens of a row. A router's softmax looks alike, but has no heads.
_SOFTMAXES = {functional.softmax, torch.softmax, Tensor.softmax}
_PROBE_TOKENS = 3


@dataclass(frozen=True)
class Sublayers:
    """The modules of one block, by their full names, whose outputs are those of its sublayers.

    Nothing but a norm, dropout and the residual comes after them.
    """

    hidden: int  # the width of the residual stream
    attentions: tuple[str, ...]  # the self-attention's, then the cross-attention's
    feed_forward: str


def find_sublayers(base: nn.Module) -> list[Sublayers]:
    """Return the sublayers of every block, in the order of the stacks.

    An attention ends in the first linear layer as wide as the residual stream that runs after its
    softmax; the feed-forward layer in the block's last one, or in the module that holds the
    experts of a mixture. Blocks whose attention and feed-forward layer run side by side, and those
    that add the residual inside of them, need no rule of their own.

    Raises:
        RecipeError: a block shows no attention, or nothing behind it, or some of its layers run on
            a part of the tokens.
    """
    traces = [
        _Trace(base, f"{stack}.{i}", block)
        for stack, blocks in adaptable_stacks(base).items()
        for i, block in enumerate(blocks)
    ]
    with _Attentions(traces):
        short_pass(base, torch.ones((1, _PROBE_TOKENS), dtype=torch.long))
    for trace in traces:
        trace.end()
    return [trace.sublayers() for trace in traces]


@dataclass(frozen=True)
class _Event:
    """What ran in a block: a layer by its full name, or an attention, which has none."""

    name: str | None
    width: int = 0
    tokens: int = 0
    experts: bool = False


class _Trace:
    """What runs in one block, in order."""

    def __init__(self, base: nn.Module, name: str, block: nn.Module) -> None:
        self.name = name
        self.block = block
        self.hidden = 0
        self.runs = False
        self.events: list[_Event] = []
        self._hooks: list[RemovableHandle] = [
            block.register_forward_pre_hook(self._start, with_kwargs=True),
            block.register_forward_hook(self._stop),
        ]
        self.layers = [f"{name}.{inner}" for inner in adaptable_linears(block)]
        for inner, child in block.named_modules():
            experts = hasattr(child, "is_transposed")
            if experts or f"{name}.{inner}" in self.layers:
                note = self._noting(f"{name}.{inner}", experts)
                self._hooks.append(child.register_forward_hook(note))

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def sublayers(self) -> Sublayers:
        attentions = self._attentions()
        behind = self.events[1 + self.events.index(attentions[-1]) :] if attentions else []
        mixtures = [event for event in behind if event.experts]
        ends = [event for event in behind if event.width == self.hidden]
        if not mixtures and not (ends and self._is_plain()):
            raise RecipeError(
                f"bottleneck: expected a softmax over 4 dimensions in {self.name}, behind it a "
                f"linear layer {self.hidden} wide that ends the attention, and one that ends the "
                f"feed-forward layer, each running once on all tokens; {self._found()} ran of "
                f"{', '.join(self.layers)}; use lora instead"
            )
        end = self._mixture(str(mixtures[-1].name)) if mixtures else str(ends[-1].name)
        return Sublayers(self.hidden, tuple(str(event.name) for event in attentions), end)

    def _attentions(self) -> list[_Event]:
        found, waiting = [], False
        for event in self.events:
            if event.name is None:
                waiting = True
            elif waiting and event.width == self.hidden and not event.experts:
                found.append(event)
                waiting = False
        return found

    def _is_plain(self) -> bool:
        # Experts that are modules of their own see a part of the tokens each, or none.
        ran = [event for event in self.events if event.name is not None]
        names = [event.name for event in ran]
        return sorted(map(str, names)) == sorted(self.layers) and len({e.tokens for e in ran}) == 1

    def _mixture(self, experts: str) -> str:
        # What the experts give is weighted, and added to a shared expert, in the module above.
        parent = experts.rpartition(".")[0]
        return experts if parent == self.name else parent

    def _found(self) -> str:
        names = [
            "an attention" if event.name is None else f"{event.name} ({event.width})"
            for event in self.events
        ]
        return ", ".join(names) or "nothing"

    def _start(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else options["hidden_states"]
        self.hidden, self.runs = hidden.shape[-1], True

    def _stop(self, *_: Any) -> None:
        self.runs = False

    def _noting(self, name: str, experts: bool) -> Callable[..., None]:
        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            width = first.shape[-1]
            self.events.append(_Event(name, width, first.numel() // width, experts))

        return note


class _Attentions(TorchFunctionMode):
    """While it is on, each attention is noted in the block that runs."""

    def __init__(self, traces: list[_Trace]) -> None:
        super().__init__()
        self.traces = traces

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        softmax = func in _SOFTMAXES and args and args[0].dim() == 4
        if softmax or func is functional.scaled_dot_product_attention:
            for trace in self.traces:
                if trace.runs:
                    trace.events.append(_Event(None))
        return func(*args, **(kwargs or {}))
