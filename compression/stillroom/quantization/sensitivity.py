"""What a model loses when single layers are quantized, measured on its outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stillroom.blocks import weight_at
from stillroom.errors import NotFiniteError, RecipeError
from stillroom.progress import Progress, silent
from stillroom.quantization.allocation import (
    LayerChoice,
    MeasuredChoice,
    ModuleChoices,
    packed_bytes,
    with_choice,
)
from stillroom.quantization.divergence import forward_arguments
from stillroom.quantization.gptq import gptq
from stillroom.quantization.options import QuantizationOptions, check_fits
from stillroom.quantization.rounding import round_to_nearest

# How far the model is from what it was when the measure was made, given the names of the layers
# that are not as they were.
Measure = Callable[[Collection[str]], float]
# (a layer's name, its weight (out, in), a choice) to the dequantized weight (out, in).
Quantize = Callable[[str, Tensor, LayerChoice], Tensor]


class Weight(Protocol):
    """A layer's weight in a model."""

    def read(self) -> Tensor:
        """Return it as (out, in)."""

    def write(self, values: Tensor) -> None:
        """Replace it by `values`, (out, in), in place."""


def rounding(options: QuantizationOptions) -> Quantize:
    """Return round-to-nearest with the options but for bits and group size."""

    def quantize(name: str, W: Tensor, choice: LayerChoice) -> Tensor:
        return round_to_nearest(W, with_choice(options, choice)).weight.dequantize()

    return quantize


def gptq_with(hessians: Mapping[str, Tensor], options: QuantizationOptions) -> Quantize:
    """Return GPTQ with the options but for bits and group size.

    `hessians` holds H, (in, in), by layer; a layer without one is rounded to nearest.
    """
    rounded = rounding(options)

    def quantize(name: str, W: Tensor, choice: LayerChoice) -> Tensor:
        if name not in hessians:
            return rounded(name, W, choice)
        return gptq(W, hessians[name], with_choice(options, choice)).weight.dequantize()

    return quantize


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
                cost = measure(group)
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
        options = with_choice(QuantizationOptions(), choice)
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
        model(**forward_arguments(model, ids, mask))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[str]] = {}
    for name in names:
        key = (_block_of(name, modules), calls[name]) if calls[name] else name
        if name not in modules and weight_at(model, name).half is not None:
            key = name.rpartition(".")[0]  # an expert's gate and up projection
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the first item of a ModuleList that holds the layer, or nothing."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:i])], nn.ModuleList):
            return ".".join(parts[: i + 1])
    return ""
