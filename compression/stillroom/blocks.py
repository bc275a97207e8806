"""Where a model's repeated blocks and their linear layers are, read off its module tree."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from stillroom.errors import RecipeError

# How transformers names the parameter of a mixture that holds each expert's gate and up projection,
# and which half of its rows is whose.
FUSED = "gate_up_proj"
GATE_AND_UP: Mapping[str, int | None] = {"gate_proj": 0, "up_proj": 1}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the model's repeated blocks.

    They are the items of the ModuleList with the most parameters among those whose items share a
    class and each hold a linear layer; no table of architectures is needed.

    Raises:
        RecipeError: no ModuleList qualifies.
    """
    found = lists_of_blocks(model)
    if not found:
        raise RecipeError(
            f"expected a model with repeated blocks that hold linear layers; "
            f"{type(model).__name__} has no such ModuleList; use a transformer"
        )
    return max(found.items(), key=lambda item: _size(item[1]))


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every list of repeated blocks by its dotted name: an encoder's and a decoder's.

    A model that is not an encoder with a decoder has one.

    Raises:
        RecipeError: there is none.
    """
    prefix, blocks = find_blocks(model)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {prefix: blocks}
    found = lists_of_blocks(model)
    outermost = [name for name in found if not any(_is_below(name, other) for other in found)]
    return {name: found[name] for name in outermost}


@dataclass(frozen=True)
class LinearWeight:
    """A weight matrix that inputs are multiplied by: a layer's, or one expert's of a mixture."""

    module: nn.Module
    parameter: str
    expert: int | None = None  # which slice of a parameter (experts, …)
    transposed: bool = False  # stored as (in, out)
    half: int | None = None  # which half of the rows, where two layers are one matrix

    @property
    def multiplied(self) -> Tensor:
        """The matrix that the model multiplies by, which may be two layers', as a view."""
        whole = cast(Tensor, getattr(self.module, self.parameter)).detach()
        return whole if self.expert is None else whole[self.expert]

    @property
    def stored(self) -> Tensor:
        """The matrix as it lies in the model, a view without gradients."""
        return self.multiplied if self.half is None else self.multiplied.chunk(2)[self.half]

    def read(self) -> Tensor:
        """Return the weight as (out, in), whichever way it is stored."""
        return self.stored.T if self.transposed else self.stored

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Replace the weight by `values`, (out, in), in place."""
        self.read().copy_(values)

    @property
    def shape(self) -> tuple[int, int]:
        """The layer's (out, in)."""
        out, columns = self.read().shape
        return out, columns

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias, (out,); an expert's is not told apart."""
        bias = getattr(self.module, "bias", None)
        return bias if self.expert is None and isinstance(bias, nn.Parameter) else None


def find_weights(module: nn.Module) -> dict[str, LinearWeight]:
    """Return every weight matrix below `module` by dotted name, in definition order.

    The fused parameter (experts, out, in) of a mixture gives one matrix an expert, named as if each
    expert were a module, experts.3.down_proj; where it holds an expert's gate above its up
    projection, it gives these two.
    """
    found = {
        name: LinearWeight(child, "weight", transposed=not isinstance(child, nn.Linear))
        for name, child in find_linears(module).items()
    }
    for name, child in module.named_modules():
        # transformers marks the modules whose parameters are stacked experts.
        if getattr(child, "is_transposed", None) is not None:
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{own}": weight for own, weight in _expert_weights(child)}
    return found


def _expert_weights(experts: nn.Module) -> Iterator[tuple[str, LinearWeight]]:
    turned = bool(experts.is_transposed)
    for parameter, tensor in experts.named_parameters(recurse=False):
        if tensor.dim() != 3:
            continue
        above = _holds_gate_above_up(experts, parameter)
        for expert in range(tensor.shape[0]):
            for name, half in (GATE_AND_UP if above else {parameter: None}).items():
                yield f"{expert}.{name}", LinearWeight(experts, parameter, expert, turned, half)


def weight_at(model: nn.Module, name: str) -> LinearWeight:
    """Return the weight of the layer `name`, as `find_weights` of the whole model names it.

    Raises:
        AttributeError: the model has no such layer.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        parent, expert, parameter = name.rsplit(".", 2)
        module = model.get_submodule(parent)
        half = None
        if parameter in GATE_AND_UP and _holds_gate_above_up(module, FUSED):
            parameter, half = FUSED, GATE_AND_UP[parameter]
        return LinearWeight(module, parameter, int(expert), bool(module.is_transposed), half)
    return LinearWeight(module, "weight", transposed=_is_conv1d(module))


def find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return every nn.Linear and transformers' Conv1D below `module`, in definition order.

    The keys are dotted names relative to `module`. Subclasses of nn.Linear are left out: their
    forward may do something else with the weight.
    """
    return {
        name: child
        for name, child in module.named_modules()
        if name and (type(child) is nn.Linear or _is_conv1d(child))
    }


def _holds_gate_above_up(experts: nn.Module, parameter: str) -> bool:
    """Return whether a fused parameter is (experts, 2 · width, hidden), the gates' rows first."""
    marks = {"has_gate": True, "is_concatenated": True, "is_transposed": False}
    return (
        parameter == FUSED
        and hasattr(experts, FUSED)
        and all(getattr(experts, mark, None) is expected for mark, expected in marks.items())
    )


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def lists_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return every ModuleList whose items share a class and each hold a dense linear layer."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(item) for item in module}) == 1
        and all(find_linears(item) for item in module)
    }


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_below(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")
