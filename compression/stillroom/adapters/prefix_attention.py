"""Keys and values before those of the text, in attention layers of any kind.

transformers' attention layers ask their config by which function to attend. A layer that wears a
prefix has a config of its own, which says the same of everything else; so the masks are made as
before, other models and the base's config stay as they are, and a layer that wears none is as it
was.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.adapters.places import adaptable_stacks
from stillroom.adapters.probe import short_pass
from stillroom.adapters.routing import Rows
from stillroom.errors import RecipeError

_NAME = "stillroom_prefix"
Attended = tuple[Tensor, Tensor | None]
Attend = Callable[..., Attended]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values, both (key-value heads, tokens, head width), and the rows that see them.

    `read` returns them anew at each call, on whatever device and of any dtype.
    """

    rows: Rows
    read: Callable[[], tuple[Tensor, Tensor]]


def record_attention(base: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the keys and values that each attention layer makes of the words `ids` (1, length).

    The keys are the layers' full names, in the order of the blocks; keys and values are (key-value
    heads, length, head width). Layers that do not attend through transformers' interface are left
    out.

    Raises:
        RecipeError: the base attends by a function that takes no mask.
    """
    _register()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    layers: dict[str, Any] = {
        f"{stack}.{name}": module
        for stack, blocks in adaptable_stacks(base).items()
        for name, module in blocks.named_modules()
        if hasattr(module.__dict__.get("config"), "_attn_implementation")
    }
    for name, layer in layers.items():
        layer.config = _LayerConfig(layer.config, _recording(name, found))
    try:
        short_pass(base, ids)
    finally:
        for layer in layers.values():
            layer.config = layer.config.original
    return {name: found[name] for name in layers if name in found}


def put_on(layer: Any, prefix: Prefix) -> None:
    """Have an attention layer read a prefix, beside those that it reads for other rows."""
    if not isinstance(layer.config, _LayerConfig):
        layer.config = _LayerConfig(layer.config, _attend_behind)
    layer.config.prefixes.append(prefix)


def take_off(layer: Any, prefix: Prefix) -> None:
    """Have an attention layer read a prefix no longer."""
    layer.config.prefixes.remove(prefix)
    if not layer.config.prefixes:
        layer.config = layer.config.original


class _LayerConfig:
    """A config that says of everything what the original says, but for how to attend."""

    _attn_implementation = _NAME

    def __init__(self, original: Any, attend: Attend) -> None:
        self.original = original
        self.attend = attend
        self.prefixes: list[Prefix] = []

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.original, name)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> Attended:
    attended: Attended = module.config.attend(
        module, query, key, value, attention_mask=attention_mask, **options
    )
    return attended


def _recording(name: str, found: dict[str, tuple[Tensor, Tensor]]) -> Attend:
    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Attended:
        found[name] = (key[0], value[0])
        return _usual_of(module)(module, query, key, value, **options)

    return record


def _usual_of(module: Any) -> Attend:
    """Return the function by which a layer attends without a prefix."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = module.config.original._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if kind == "eager" and eager is not None:
        return eager  # type: ignore[no-any-return]
    if kind == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-any-return]
    raise RecipeError(
        f"prefix_tuning: expected a base that attends by sdpa or eager, {type(module).__name__} "
        f"attends by {kind}; load the base with attn_implementation='sdpa'"
    )


def _attend_behind(
    module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Attended:
    """Attend, and in the rows that wear a prefix behind that."""
    prefixes: list[Prefix] = module.config.prefixes
    for prefix in prefixes:
        if prefix.rows is True:
            return _behind(prefix, module, query, key, value, **options)
    # Once for all rows, so that the others' numbers are the base's.
    output, weights = _usual_of(module)(module, query, key, value, **options)
    for prefix in prefixes:
        rows = torch.as_tensor(prefix.rows, device=query.device)
        own = {name: _of_rows(each, rows, len(query)) for name, each in options.items()}
        new, seen = _behind(prefix, module, query[rows], key[rows], value[rows], **own)
        output = output.index_copy(0, rows, new)
        if weights is not None and seen is not None:
            weights = weights.index_copy(0, rows, seen)
    return output, weights


def _behind(
    prefix: Prefix,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> Attended:
    """Attend to a prefix and the text; return what (batch, queries, heads, width), and the weights.

    The weights are those of the text alone, as wide as callers expect.
    """
    keys, values = (
        torch.cat([own.to(text).expand(len(text), -1, -1, -1), text], dim=2)
        for own, text in zip(prefix.read(), (key, value), strict=True)
    )
    count = keys.shape[2] - key.shape[2]
    if position_bias is not None:  # a prefix has no place, and no bias (T5)
        options["position_bias"] = functional.pad(position_bias, (count, 0))
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # Without a mask, sdpa alone looks at that.
    causal = causal and module.config.original._attn_implementation == "sdpa"
    mask = _mask_behind(count, attention_mask, (query.shape[2], key.shape[2]), causal, key.device)
    output, weights = _usual_of(module)(module, query, keys, values, mask, **options)
    return output, None if weights is None else weights[..., count:]


def _mask_behind(
    count: int,
    mask: Tensor | None,
    shape: tuple[int, int],
    causal: bool,
    device: torch.device,
) -> Tensor | None:
    """Return a mask (…, queries, count + keys) that shows every query the prefix."""
    queries, keys = shape
    if mask is None:
        if not causal or queries == 1:
            return None
        mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device).tril()
    seen = torch.ones if mask.dtype == torch.bool else torch.zeros
    before = seen((*mask.shape[:-1], count), dtype=mask.dtype, device=mask.device)
    return torch.cat([before, mask[..., :keys]], dim=-1)


def _of_rows(option: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(option, Tensor) and option.dim() > 1 and len(option) == batch:
        return option[rows]
    return option
