"""Find out which dimension of which parameter belongs to which width, and prove it.

Shapes of the model class under configs with one width doubled say what belongs to what. They cannot
say how a fused matrix lies, nor, where hidden_size is heads · head_dim by definition, channels from
heads. So each possibility is tried on a small random model: doubling a width by having every
channel, neuron and group of heads twice, in random order, and halving what sums over them, must
leave the logits as they are. One that passes is right; this also finds models whose code computes
something from a width or from a head's number (Gemma's embedding scale, ALiBi).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.blocks import find_blocks, find_linears
from stillroom.distillation.dense_student import is_mixture
from stillroom.distillation.width_axes import Axes, Axis, Kind, block_of, totals
from stillroom.distillation.width_proof import (
    check_used,
    empty,
    filled,
    holds,
    random_state,
    run,
    shapes,
)
from stillroom.distillation.width_sizes import FIELD, Sizes, read_sizes, resized
from stillroom.errors import RecipeError

Marks = dict[str, tuple[Kind | None, ...]]
Key = tuple[str, Kind, int]  # a module's name in any block, the width, entries an item
MOST_PROPOSALS = 32


def find_axes(model: PreTrainedModel) -> Axes:
    """Return what each dimension of each saved tensor counts, None where no width changes it.

    Takes the memory of a model with three groups of heads, and of one twice as wide. Draws no
    number from the global generator.

    Raises:
        RecipeError: the model is a mixture, an encoder with a decoder, or has cross-attention; a
            dimension depends on widths in a way that is not known; or no possibility, or more than
            one, passes the test.
    """
    kind, config = type(model), model.config
    if (
        is_mixture(model)
        or config.is_encoder_decoder
        or getattr(config, "add_cross_attention", False)
    ):
        raise RecipeError(
            f"{FIELD}: a dense model of one stack of blocks expected, {kind.__name__} came, which "
            "has experts or a second stack; leave it out, or make the teacher dense first"
        )
    _check_shapes(model)
    sizes = _small(read_sizes(config))
    with_blocks = empty(kind, resized(config, sizes))
    blocks, _ = find_blocks(with_blocks)
    marks = _probe(kind, config, sizes)
    state = random_state(with_blocks)
    small = filled(kind, resized(config, sizes), state)
    ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        expected = run(small, ids)
    if expected is None:
        raise RecipeError(
            f"{FIELD}: a {kind.__name__} expected that runs with {sizes.hidden} channels, and it "
            "does not: its config names that width more than once; take another teacher"
        )
    check_used(small, expected, blocks)
    passed = [
        axes
        for axes in _proposals(small, marks, sizes, blocks)
        if holds(small, axes, sizes, ids, expected.detach())
    ]
    if len(passed) != 1:
        raise RecipeError(
            f"{FIELD}: one way expected to read the widths off the parameters of a {kind.__name__}"
            f", {len(passed)} were found: its code uses them in a way that is not known; take "
            "another teacher, or a student of fewer layers"
        )
    return passed[0]


def _check_shapes(model: PreTrainedModel) -> None:
    config = resized(model.config, read_sizes(model.config))
    described = shapes(type(model), config)
    came = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if came != described:
        names = came | described
        name = min(name for name in names if came.get(name) != described.get(name))
        raise RecipeError(
            f"{FIELD}: the tensors expected that the config of a {type(model).__name__} describes, "
            f"and {name} is {came.get(name)} for {described.get(name)}; take a teacher unquantized "
            "and without adapters"
        )


def _small(sizes: Sizes) -> Sizes:
    # Three groups: two could be exchanged and still look alike. Llama's hidden_size must divide.
    heads = 3 * sizes.ratio
    hidden = heads * (8 if sizes.free else sizes.head_dim)
    return replace(sizes, hidden=hidden, intermediate=20, heads=heads, groups=3)


def _probe(kind: type[PreTrainedModel], config: PreTrainedConfig, sizes: Sizes) -> Marks:
    """Return which width each dimension changes with; "channels" may be heads if not free."""
    more_heads = replace(sizes, heads=2 * sizes.heads, groups=2 * sizes.groups)
    changes: dict[Kind, Sizes] = {
        "channels": replace(sizes if sizes.free else more_heads, hidden=2 * sizes.hidden),
        "neurons": replace(sizes, intermediate=2 * sizes.intermediate),
    }
    if sizes.free:
        changes["groups"] = more_heads
    plain = shapes(kind, resized(config, sizes))
    marks: dict[str, list[Kind | None]] = {name: [None] * len(s) for name, s in plain.items()}
    for width, change in changes.items():
        changed = shapes(kind, resized(config, change))
        for name in plain | changed:
            before, after = plain.get(name, ()), changed.get(name, ())
            factors = [b / a for a, b in zip(before, after, strict=False)]
            clash = any(f == 2 and m for f, m in zip(factors, marks.get(name, []), strict=False))
            if len(before) != len(after) or clash or not set(factors) <= {1, 2}:
                raise RecipeError(
                    f"{FIELD}: dimensions expected that belong to one width each, and {name} of a "
                    f"{kind.__name__} goes from {list(before)} to {list(after)} with twice the "
                    f"{width}; take another teacher, or a student of fewer layers"
                )
            for dim, factor in enumerate(factors):
                if factor == 2:
                    marks[name][dim] = width
    return {name: tuple(mark) for name, mark in marks.items()}


def _proposals(model: PreTrainedModel, marks: Marks, sizes: Sizes, blocks: str) -> Iterator[Axes]:
    """Yield every way in which the dimensions may be meant."""
    for resolved in [marks] if sizes.free else _with_heads(model, marks, blocks):
        keys = _keys(model, resolved, sizes, blocks)
        if keys is None:
            continue
        options = {key: _layouts(key[1], key[2], sizes) for key in keys.values()}
        if prod(len(each) for each in options.values()) > MOST_PROPOSALS:
            continue
        for combination in product(*options.values()):
            yield _axes(model, resolved, keys, dict(zip(options, combination, strict=True)))


def _keys(
    model: PreTrainedModel, marks: Marks, sizes: Sizes, blocks: str
) -> dict[tuple[str, int], Key] | None:
    """Return what the layout of each dimension hangs on; None where an item has no whole number.

    A layer's bias lies as its weight does, and all blocks are alike.
    """
    keys: dict[tuple[str, int], Key] = {}
    for name, tensor in model.state_dict().items():
        for dim, kind in enumerate(marks[name]):
            if kind is None:
                continue
            size, rest = divmod(tensor.shape[dim], totals(sizes)[kind])
            if rest or (kind != "channels" and block_of(name, blocks) is None):
                return None
            keys[name, dim] = (_relative(name.rpartition(".")[0], blocks), kind, size)
    return keys


def _axes(
    model: PreTrainedModel,
    marks: Marks,
    keys: dict[tuple[str, int], Key],
    layouts: dict[Key, tuple[int, ...]],
) -> Axes:
    linears = find_linears(model)
    return {
        name: tuple(
            Axis(kind, layouts[keys[name, dim]], _is_input(name, dim, linears)) if kind else None
            for dim, kind in enumerate(mark)
        )
        for name, mark in marks.items()
    }


def _with_heads(model: PreTrainedModel, marks: Marks, blocks: str) -> Iterator[Marks]:
    """Yield the marks with heads told from channels, for each layer that may join the heads.

    A block's layers from channels to channels are those into heads, and one back.
    """
    linears = find_linears(model)
    inner: dict[str, list[str]] = {}
    for name in linears:
        if name.startswith(f"{blocks}.") and marks[f"{name}.weight"] == ("channels", "channels"):
            inner.setdefault(_relative(name, blocks), []).append(name)
    into: tuple[Kind | None, ...] = ("groups", "channels")  # (out, in)
    back = into[::-1]
    for joining in inner:
        resolved = dict(marks)
        for relative, names in inner.items():
            weight = back if relative == joining else into
            for name in names:
                stored = weight if isinstance(linears[name], nn.Linear) else weight[::-1]
                resolved[f"{name}.weight"] = stored
                if relative != joining and f"{name}.bias" in marks:
                    resolved[f"{name}.bias"] = ("groups",)
        yield resolved


def _layouts(kind: Kind, size: int, sizes: Sizes) -> list[tuple[int, ...]]:
    """Return how `size` entries an item may lie: all of an item in a row, or parts side by side."""
    if kind != "groups":
        return [(1,)] if size == 1 else [(size,), (1,) * size]
    queries = sizes.ratio * sizes.head_dim
    if size == queries + 2 * sizes.head_dim:  # queries, keys and values in one
        return [(size,), (queries, sizes.head_dim, sizes.head_dim)]
    if size % queries == 0 and size > queries:
        return [(size,), (queries,) * (size // queries)]
    return [(size,)]


def _is_input(name: str, dim: int, linears: dict[str, nn.Module]) -> bool:
    module, _, parameter = name.rpartition(".")
    layer = linears.get(module)
    return layer is not None and parameter == "weight" and dim == isinstance(layer, nn.Linear)


def _relative(name: str, blocks: str) -> str:
    if not name.startswith(f"{blocks}."):
        return name
    return "*." + name.removeprefix(f"{blocks}.").partition(".")[2]
