"""A frozen base with adapters by name: one is worn, none, or another one in each row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.base_identity import BaseIdentity, identify
from stillroom.adapters.bitfit import BitFitAdapter
from stillroom.adapters.bottleneck import BottleneckAdapter
from stillroom.adapters.copies import FullCopy, TopLayersCopy
from stillroom.adapters.head import TrainedHead
from stillroom.adapters.lora import LoraAdapter
from stillroom.adapters.options import (
    AdapterOptions,
    BitFitOptions,
    BottleneckOptions,
    FullOptions,
    LoraOptions,
    PrefixOptions,
    PromptOptions,
    PTuningOptions,
    TopLayersOptions,
)
from stillroom.adapters.part import Part, unhooked_on_failure
from stillroom.adapters.prefix_tuning import PrefixAdapter
from stillroom.adapters.prompted_base import chosen, row_limit
from stillroom.adapters.prompts import PromptAdapter
from stillroom.adapters.routing import Rows, rows_by_name
from stillroom.contents import Task
from stillroom.errors import RecipeError


class Worn(nn.Module):
    """One adapter: what its method adds, and a classifier's head of its own where there is one."""

    def __init__(
        self, options: AdapterOptions, task: Task, method: Part, head: TrainedHead | None
    ) -> None:
        super().__init__()
        self.options = options
        self.task: Task = task
        self.method = method
        self.head = head

    @property
    def parts(self) -> dict[str, Part]:
        """The method's part and the head, by name."""
        return {"method": self.method} | ({} if self.head is None else {"head": self.head})


class AdaptedModel(nn.Module):
    """A base, frozen, and the adapters that were put on it; whatever else is asked, it answers.

    The base is changed in place by hooks, and its parameters never: what it computes with one
    adapter does not depend, to the bit, on which others there are.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = base
        self.adapters = nn.ModuleDict()
        self.selected: str | None = None
        self.identity: BaseIdentity = identify(base)
        # What is put on a base that computes without dropout does so too.
        self.training = self.adapters.training = base.training

    def add(
        self, name: str, options: AdapterOptions, *, task: Task = "causal_lm", seed: int = 0
    ) -> None:
        """Put a fresh adapter on the base, drawn from `seed`, and wear it.

        Where that fails, the model is as it was before.

        Raises:
            RecipeError: the name is taken, or the method does not fit the base.
        """
        if name in self.adapters:
            raise RecipeError(f"adapter {name}: expected another name, this one is taken")
        before = self.selected
        self.select(None)
        try:
            with unhooked_on_failure(self.base):
                part = _part(self.base, options, seed)
                # A full copy has its head in itself.
                own_head = task == "sequence_classification" and not isinstance(part, FullCopy)
                head = TrainedHead(self.base) if own_head else None
                self.adapters[name] = Worn(options, task, part, head).train(self.training)
        except BaseException:
            self.select(before)
            raise
        self.select(name)

    def remove(self, name: str) -> None:
        """Take an adapter off the base for good; another that is worn stays."""
        parts = self.worn(name).parts
        if self.selected == name:
            self.select(None)
        for part in parts.values():
            part.detach()
        del self.adapters[name]

    def select(self, name: str | None) -> None:
        """Wear the adapter `name`, or none, from now on.

        Raises:
            RecipeError: there is no such adapter.
        """
        if name is not None:
            self.worn(name)
        self._dress({name: True} if name else {})
        self.selected = name

    def trainable(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter, and have gradients reach them alone."""
        own = list(self.worn(name).parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)
        return own

    def forward(
        self,
        input_ids: Tensor,
        *,
        adapter_names: Sequence[str | None] | None = None,
        **inputs: Any,
    ) -> Any:
        """Return the base's output for `input_ids` (batch, length), wearing what is selected.

        `adapter_names` (batch) says of each row which adapter it wears instead; None is none.

        Raises:
            RecipeError: there is no such adapter, or another number of names than rows.
        """
        if adapter_names is None:
            return self.base(input_ids=input_ids, **inputs)
        outputs: dict[str, Any] = {}
        for rows in self._passes(adapter_names, len(input_ids)):
            names = [adapter_names[row] for row in rows]
            which = torch.tensor(rows, device=input_ids.device)
            own = {
                key: value[which] if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
            with self._dressed(names):
                output = self.base(input_ids=input_ids[which], **own)
            _gather(outputs, output, which, len(input_ids))
        return type(output)(**outputs)

    def generate(
        self,
        input_ids: Tensor,
        *,
        adapter_names: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Return what the base's `generate` makes of `input_ids` (batch, length), continued.

        Raises:
            RecipeError: rows wear adapters that need a pass of their own beside others.
        """
        if adapter_names is None:
            return self._generate(input_ids, options)
        if len(self._passes(adapter_names, len(input_ids))) > 1:
            raise RecipeError(
                "generate: prompts, trained layers, full copies, and adapters of experts or of "
                "layers that also read what positions share, cannot share a batch with other "
                f"adapters; {', '.join(map(str, adapter_names))} came; generate one after another"
            )
        # A row that is continued in several ways is as many rows.
        ways = max(
            chosen(self.base, options, name) or 1 for name in ("num_beams", "num_return_sequences")
        )
        names = [name for name in adapter_names for _ in range(ways)]
        with self._dressed(names), self._encoder_dressed(adapter_names, names):
            return self._generate(input_ids, options)

    def __getattr__(self, name: str) -> Any:
        """Return what the base has, such as its config."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def _generate(self, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
        for name in self.adapters:
            method = self.worn(name).method
            if isinstance(method, PromptAdapter | FullCopy) and method.rows is True:
                return method.generate(self.base, input_ids, **options)  # type: ignore[no-any-return]
        return self.base.generate(input_ids=input_ids, **options)  # type: ignore[no-any-return]

    def worn(self, name: str) -> Worn:
        """Return the adapter `name`.

        Raises:
            RecipeError: there is no such adapter.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise RecipeError(f"adapter {name}: the model has {known}; load it first")
        worn = self.adapters[name]
        assert isinstance(worn, Worn)
        return worn

    def _dress(self, rows: dict[str, Rows]) -> None:
        # First off, then on: two that change the same layers must not overlap.
        for name in [*(name for name in self.adapters if name not in rows), *rows]:
            for part in self.worn(name).parts.values():
                part.wear(rows.get(name, False))

    @contextmanager
    def _dressed(self, names: Sequence[str | None]) -> Iterator[None]:
        self._dress(rows_by_name(names))
        try:
            yield
        finally:
            self.select(self.selected)

    @contextmanager
    def _encoder_dressed(
        self, names: Sequence[str | None], afterwards: Sequence[str | None]
    ) -> Iterator[None]:
        """Dress an encoder's rows by `names`: `generate` repeats rows behind the encoder alone."""
        has_decoder = getattr(self.base.config, "is_encoder_decoder", False)
        if not has_decoder or len(set(names)) == 1:
            yield
            return
        encoder = self.base.get_encoder()
        hooks = [
            encoder.register_forward_pre_hook(lambda *_: self._dress(rows_by_name(names))),
            encoder.register_forward_hook(lambda *_: self._dress(rows_by_name(afterwards))),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _passes(self, names: Sequence[str | None], count: int) -> list[list[int]]:
        """Return the rows of each forward pass: those that can share one do."""
        if len(names) != count:
            raise RecipeError(
                f"adapter_names: expected a name or None for each of {count} rows, {len(names)} "
                "came"
            )
        passes: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            own = name if name is not None and self.worn(name).method.alone else None
            passes.setdefault(own, []).append(row)
        return list(passes.values())


def text_limit(model: Any) -> int | None:
    """Return the most tokens of text in a row of `model`, adapted or not; None: any number.

    Virtual tokens of the adapter that is selected take their places from it.
    """
    if not isinstance(model, AdaptedModel):
        return row_limit(model)
    limit = row_limit(model.base)
    if limit is None or model.selected is None:
        return limit
    method = model.worn(model.selected).method
    return limit - method.count if isinstance(method, PromptAdapter) else limit


def _part(base: Any, options: AdapterOptions, seed: int) -> Part:
    part: Part
    match options:
        case LoraOptions():
            part = LoraAdapter(base, options, seed)
        case BottleneckOptions():
            part = BottleneckAdapter(base, options, seed)
        case PrefixOptions():
            part = PrefixAdapter(base, options, seed)
        case PromptOptions() | PTuningOptions():
            part = PromptAdapter(base, options, seed)
        case BitFitOptions():
            part = BitFitAdapter(base)
        case TopLayersOptions():
            part = TopLayersCopy(base, options)
        case FullOptions():
            part = FullCopy(base)
    return part


def _gather(outputs: dict[str, Any], part: Any, rows: Tensor, count: int) -> None:
    """Put the rows of one pass's output into those of the whole batch."""
    for key, value in part.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == len(rows):
            whole = outputs.setdefault(key, value.new_zeros((count, *value.shape[1:])))
            # Copies compute in float32 beside a base of half precision.
            whole[rows] = value.to(whole.dtype)
