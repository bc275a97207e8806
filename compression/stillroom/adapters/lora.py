"""Low-rank adapters (LoRA, 2106.09685), beside dense and beside quantized layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.adapters.flattened import BatchRows, sees_rows
from stillroom.adapters.options import LoraOptions
from stillroom.adapters.part import Part
from stillroom.adapters.places import adaptable_blocks, adaptable_linears
from stillroom.adapters.probe import device_of, key_of
from stillroom.blocks import weight_at
from stillroom.errors import MismatchError, NotFiniteError, RecipeError
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.options import derived_seed


class LowRank(nn.Module):
    """The update (α / r) · B A dropout(x) of one layer, A (r, in) and B (out, r) in float32."""

    def __init__(self, layer: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__()
        inputs, outputs = _features(layer)
        bound = inputs**-0.5  # as nn.Linear, and peft, start theirs
        a = (torch.rand((options.rank, inputs), generator=generator) * 2 - 1) * bound
        device = device_of(layer)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros((outputs, options.rank), device=device))
        self.dropout = nn.Dropout(options.dropout)
        self.scale = options.alpha / options.rank

    def forward(self, x: Tensor) -> Tensor:
        """Return the update (..., out) for inputs (..., in)."""
        inner = functional.linear(self.dropout(x.to(self.A.dtype)), self.A)
        # Scaled where it is narrow: of the wide update there is no second copy.
        return functional.linear(inner * self.scale, self.B)


class LoraAdapter(Part):
    """Low-rank updates of the outputs of linear layers; fresh ones change nothing."""

    def __init__(self, base: nn.Module, options: LoraOptions, seed: int) -> None:
        super().__init__()
        self.targets = target_names(base, options.target_modules)
        self.updates = nn.ModuleDict()
        self._batch = BatchRows(self, base)
        generator = torch.Generator().manual_seed(derived_seed(seed, "lora"))
        for name in self.targets:
            layer = base.get_submodule(name)
            self.updates[key_of(name)] = LowRank(layer, options, generator)
            self.hook(layer, partial(self._add, key_of(name)))
        self.alone = not sees_rows(base, self.targets)

    def merge(self, base: nn.Module) -> None:
        """Add the updates into the base's weights, in place.

        Raises:
            MismatchError: a layer is quantized, and the sum would lie on no grid.
            NotFiniteError: a merged weight is NaN or infinite; nothing was changed.
        """
        merged = {}
        for name in self.targets:
            if isinstance(base.get_submodule(name), QuantizedLinear):
                raise MismatchError(
                    "merging needs a dense base, and this one is quantized: load it with "
                    "weights='dense', and quantize the merged model again if it must be small"
                )
            update: Any = self.updates[key_of(name)]
            weight = weight_at(base, name)
            with torch.no_grad():
                merged[name] = weight.read() + update.scale * (update.B @ update.A)
            if not torch.isfinite(merged[name]).all():
                raise NotFiniteError(
                    f"merging: expected finite weights, those of {name} would not be; train the "
                    "adapter again"
                )
        for name, value in merged.items():
            weight_at(base, name).write(value.to(weight_at(base, name).stored.dtype))

    def _add(self, key: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = self.updates[key]
        return self._batch.change(self.rows, output, lambda own, x: own + update(x), *inputs)


def target_names(model: nn.Module, wanted: tuple[str, ...] | None) -> list[str]:
    """Return the full names of the linear layers in the blocks to adapt, in definition order.

    `wanted` are the last parts of their names; None: all.

    Raises:
        RecipeError: a wanted ending fits no linear layer in the blocks.
    """
    prefix, blocks = adaptable_blocks(model)
    inside = {
        f"{prefix}.{i}.{name}": name
        for i, block in enumerate(blocks)
        for name in adaptable_linears(block)
    }
    if wanted is None:
        return list(inside)
    missing = [name for name in wanted if not any(_ends(full, name) for full in inside)]
    if missing:
        raise RecipeError(
            f"adapter.target_modules: {', '.join(missing)} is not in the model; choose from "
            f"{', '.join(sorted(set(inside.values())))}"
        )
    return [full for full in inside if any(_ends(full, name) for name in wanted)]


def is_transposed(model: nn.Module, names: list[str]) -> bool:
    """Return whether any of these layers keeps its weight as (in, out), as GPT-2's do."""
    return any(weight_at(model, name).transposed for name in names)


def shortest_endings(model: nn.Module, names: list[str]) -> list[str]:
    """Return endings that fit these layers of `model` and no other, sorted.

    They are the names inside a block, such as self_attn.q_proj, or the full ones where a layer
    elsewhere ends in the same way.
    """
    prefix, _ = adaptable_blocks(model)
    endings = {name.removeprefix(f"{prefix}.").partition(".")[2] for name in names}
    chosen = set(names)
    for full, _ in model.named_modules():
        if full not in chosen and any(_ends(full, ending) for ending in endings):
            return sorted(names)
    return sorted(endings)


def _ends(full: str, ending: str) -> bool:
    return full == ending or full.endswith(f".{ending}")


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.in_features, layer.out_features
    weight: Any = layer.weight  # GPT-2's Conv1D
    inputs, outputs = weight.shape
    return inputs, outputs
