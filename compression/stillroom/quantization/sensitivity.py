"""What a model loses when single layers are quantized, measured on its outputs."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.errors import DataError, NotFiniteError, RecipeError
from stillroom.progress import Progress, silent
from stillroom.quantization.allocation import (
    LayerChoice,
    MeasuredChoice,
    ModuleChoices,
    packed_bytes,
)
from stillroom.quantization.gptq import gptq
from stillroom.quantization.options import QuantizationOptions, check_fits
from stillroom.quantization.rounding import round_to_nearest

# How far the model is from what it was when the measure was made.
Measure = Callable[[], float]
# (a layer's name, its weight (out, in), a choice) to the dequantized weight (out, in).
Quantize = Callable[[str, Tensor, LayerChoice], Tensor]


class Weight(Protocol):
    """A layer's weight in a model."""

    def read(self) -> Tensor:
        """Return it as (out, in)."""

    def write(self, values: Tensor) -> None:
        """Replace it by `values`, (out, in), in place."""


class Rows(Protocol):
    """Tokenised rows, (rows, length) int64 each; the mask is 1 at real tokens."""

    @property
    def input_ids(self) -> Tensor:
        """Return the token ids."""

    @property
    def attention_mask(self) -> Tensor:
        """Return the mask."""


def rounding(options: QuantizationOptions) -> Quantize:
    """Return round-to-nearest with the options but for bits and group size."""

    def quantize(name: str, W: Tensor, choice: LayerChoice) -> Tensor:
        return round_to_nearest(W, _with(options, choice)).weight.dequantize()

    return quantize


def gptq_with(hessians: Mapping[str, Tensor], options: QuantizationOptions) -> Quantize:
    """Return GPTQ with the options but for bits and group size.

    `hessians` holds H, (in, in), by layer; a layer without one is rounded to nearest.
    """
    rounded = rounding(options)

    def quantize(name: str, W: Tensor, choice: LayerChoice) -> Tensor:
        if name not in hessians:
            return rounded(name, W, choice)
        return gptq(W, hessians[name], _with(options, choice)).weight.dequantize()

    return quantize


def _with(options: QuantizationOptions, choice: LayerChoice) -> QuantizationOptions:
    return replace(options, bits=choice.bits, group_size=choice.group_size)  # type: ignore[arg-type]


def measure_costs(
    weights: Mapping[str, Weight],
    groups: Sequence[tuple[str, ...]],
    offers: Sequence[LayerChoice],
    measure: Measure,
    quantize: Quantize,
    *,
    progress: Progress = silent,
) -> Iterator[ModuleChoices]:
    """Yield for each group of tied layers what each choice costs while the others stay as they are.

    `weights` holds every layer of the groups by name; the model has its own weights again after
    each group, so that a caller who keeps what came can continue with the groups that are left.
    Offers that do not fit all layers of a group are left out there.

    Raises:
        RecipeError: no offer fits a group.
        NotFiniteError: a measure is NaN or infinite.
    """
    for done, group in enumerate(groups):
        with replaced(weights, quantize) as replace_by:
            options = []
            for choice, size in _fitting(weights, group, offers):
                replace_by(dict.fromkeys(group, choice))
                cost = measure()
                if not cost < float("inf"):
                    raise NotFiniteError(
                        f"{group[0]} at {choice.bits} bits in groups of {choice.group_size}: "
                        f"expected a finite loss, got {cost}; compute the model in float32"
                    )
                options.append(MeasuredChoice(choice, size, cost))
        progress(done + 1, len(groups), "groups of layers", group[0])
        yield ModuleChoices(group, tuple(options))


@contextmanager
def replaced(
    weights: Mapping[str, Weight], quantize: Quantize
) -> Iterator[Callable[[Mapping[str, LayerChoice]], None]]:
    """Give a function that quantizes layers of the model in place; at the end all are as before.

    Layers that have their choice already are not quantized again. A copy of each replaced weight
    is held in memory.
    """
    originals: dict[str, Tensor] = {}
    present: dict[str, LayerChoice] = {}

    def replace_by(layers: Mapping[str, LayerChoice]) -> None:
        for name, choice in layers.items():
            if name not in originals:
                originals[name] = weights[name].read().clone()
            if present.get(name) != choice:
                weights[name].write(quantize(name, originals[name], choice))
                present[name] = choice

    try:
        yield replace_by
    finally:
        for name, original in originals.items():
            weights[name].write(original)


def _fitting(
    weights: Mapping[str, Weight], group: tuple[str, ...], offers: Sequence[LayerChoice]
) -> list[tuple[LayerChoice, int]]:
    """Return the choices that fit all layers of a group, and the bytes that they take together."""
    shapes = {name: tuple(weights[name].read().shape) for name in group}
    fitting, refused = [], None
    for choice in offers:
        options = _with(QuantizationOptions(), choice)
        try:
            for name, (out, columns) in shapes.items():
                check_fits(options, out, columns, name)
        except RecipeError as error:
            refused = error
            continue
        sizes = [
            packed_bytes(out, columns, choice.bits, choice.group_size)
            for out, columns in shapes.values()
        ]
        fitting.append((choice, sum(sizes)))
    if not fitting:
        raise RecipeError(
            f"expected bits and groups that fit {group[0]}, and none of {len(offers)} does: "
            f"{refused or 'offer some'}"
        )
    return fitting


@torch.no_grad()
def tied_layers(
    model: nn.Module, names: Sequence[str], ids: Tensor, mask: Tensor
) -> list[tuple[str, ...]]:
    """Return the layers in groups that get the very same input tensors in one block.

    `ids` and `mask`, (rows, length), are run through the model once; their hidden states stay in
    memory meanwhile, so a row of few tokens is best. Layers that are not called stand alone.
    """
    modules = dict(model.named_modules())
    inputs: list[Tensor] = []  # kept, so that no two have the same identity
    calls: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args:
                found = (i for i, other in enumerate(inputs) if other is args[0])
                place = next(found, len(inputs))
                inputs.extend(args[:1] if place == len(inputs) else ())
                calls[name] = (*calls[name], place)

        return see

    hooks = [
        modules[name].register_forward_pre_hook(hook_for(name)) for name in names if name in modules
    ]
    try:
        model(**_arguments(model, ids, mask))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[str]] = {}
    for name in names:
        key = (_block_of(name, modules), calls[name]) if calls[name] else name
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the first item of a ModuleList that holds the layer, or nothing."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:i])], nn.ModuleList):
            return ".".join(parts[: i + 1])
    return ""


@dataclass(frozen=True)
class _Part:
    """Rows that are run together, and the positions whose logits are looked at."""

    ids: Tensor  # (rows, length)
    mask: Tensor  # (rows, length)
    positions: Tensor  # (kept,), picked in any of the rows
    picked: Tensor  # (rows, kept) bool


def kl_measure(model: nn.Module, rows: Rows, *, tokens: int = 256, batch_size: int = 1) -> Measure:
    """Return a measure of the KL divergence, in nats per token, from the model as it is now.

    It is KL(now ‖ then) averaged over up to `tokens` real tokens, spread evenly over the rows; of
    a classifier, over the rows that hold them. The log-probabilities of now are kept, float32
    (tokens, vocabulary). `batch_size` is in rows.

    Raises:
        DataError: there are no rows.
    """
    parts = _parts(rows, tokens, batch_size, next(model.parameters()).device)
    model.train(False)
    now = [_log_probabilities(model, part) for part in parts]

    def measure() -> float:
        total, count = 0.0, 0
        for part, log_p in zip(parts, now, strict=True):
            p, q = log_p.double(), _log_probabilities(model, part).double()
            # Σ (q - p) is zero but for rounding, which it takes out of Σ p (log p - log q): what
            # 8 bits cost is smaller than that. Each term is at least zero.
            total += float((q.exp() - p.exp() * (1 + q - p)).sum())
            count += len(log_p)
        return total / count

    return measure


def _parts(rows: Rows, tokens: int, batch_size: int, device: torch.device) -> list[_Part]:
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
    arguments = _arguments(model, part.ids, part.mask)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if keeps:
        # The head runs at these positions only: logits of all would be the largest tensor of all.
        arguments["logits_to_keep"] = part.positions
    logits: Tensor = model(**arguments).logits
    if logits.dim() == 3:
        logits = (logits if keeps else logits[:, part.positions])[part.picked]
    return logits.float().log_softmax(-1)


def _arguments(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
        arguments["decoder_attention_mask"] = mask
    return arguments
