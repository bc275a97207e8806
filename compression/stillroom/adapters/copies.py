"""Parts of a base that are trained in a copy: what adapters are compared with.

A module is answered by its copy while that is worn: its `forward` points to the copy's, and nothing
else of the base changes, neither its tree nor a parameter's name. Hooks on the module itself run
on; those inside it do not, as the copies have none.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillroom.adapters.options import TopLayersOptions
from stillroom.adapters.part import Part
from stillroom.adapters.places import adaptable_blocks
from stillroom.adapters.routing import Rows
from stillroom.errors import RecipeError
from stillroom.quantization.linear import QuantizedLinear


class Answering(Part):
    """What answers in place of modules of the base."""

    alone = True

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._before: list[Callable[..., Any] | None] | None = None

    def answer(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Have `forward` answer calls of `module` while this is worn.

        It is no closure: of one, a copy of the model would ask the original's.
        """
        self._answers.append((module, forward))

    def wear(self, rows: Rows) -> None:
        """Have all rows go through it, or none."""
        super().wear(rows)
        if rows is not False and self._before is None:
            # A module has a forward of its own where another library put one there.
            self._before = [vars(module).get("forward") for module, _ in self._answers]
            for module, forward in self._answers:
                vars(module)["forward"] = forward
        elif rows is False and self._before is not None:
            for (module, _), before in zip(self._answers, self._before, strict=True):
                del vars(module)["forward"]
                if before is not None:
                    vars(module)["forward"] = before
            self._before = None


class TopLayersCopy(Answering):
    """Trainable copies of the last blocks, a decoder's where there is one; fresh ones are equal.

    Their parameters are float32, and multiplied in the base's dtype, into which they are rounded
    at each call; quantized layers are dense in them.
    """

    def __init__(self, base: Any, options: TopLayersOptions) -> None:
        super().__init__()
        has_decoder = getattr(base.config, "is_encoder_decoder", False)
        blocks = adaptable_blocks(base.get_decoder() if has_decoder else base)[1]
        first = len(blocks) - options.layers
        if first < 0:
            raise RecipeError(
                f"top_layers.layers: expected at most {len(blocks)}, which the model has; "
                f"{options.layers} came"
            )
        self.copies = nn.ModuleDict()
        for number in range(first, len(blocks)):
            own = dense_copy(blocks[number])
            self.copies[str(number)] = own
            self._put(blocks[number], own, _dtypes_of(blocks[number], own, base.dtype))
            for parameter in own.parameters():
                parameter.data = parameter.data.float()

    def _put(self, block: nn.Module, own: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
        if set(dtypes.values()) == {torch.float32}:
            self.answer(block, _in_place_of(own, partial(_answer, block, own)))
            return
        for child in own.modules():
            vars(child).pop("gradient_checkpointing", None)
        self.answer(block, _in_place_of(own, partial(_answer_rounded, block, own, dtypes)))


class FullCopy(Answering):
    """A trainable float32 copy of the whole base, dense where that is quantized."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.copy: Any = dense_copy(base)
        # Buffers too; transformers' own refuses models that are called quantized.
        nn.Module.float(self.copy)
        self.answer(base, _in_place_of(self.copy, partial(_answer, base, self.copy)))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is to be saved, by name: tied weights once."""
        once: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            once.setdefault(id(tensor), (name, tensor.detach()))
        return dict(once.values())

    def generate(self, base: Any, input_ids: Tensor, **options: Any) -> Any:
        """Return what the copy's `generate` returns for `input_ids` (batch, length)."""
        self.copy.generation_config = base.generation_config
        return self.copy.generate(input_ids=input_ids, **options)


def dense_copy(module: nn.Module) -> nn.Module:
    """Return a trainable copy of `module` without its hooks; quantized layers become dense."""
    memo: dict[int, Any] = {}  # what is in here counts as copied
    for child in module.modules():
        if isinstance(child, QuantizedLinear):
            memo[id(child)] = copy.deepcopy(child.to_linear())  # whose bias is the layer's own
        for name, hooks in vars(child).items():
            if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                memo[id(hooks)] = OrderedDict()
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        # transformers hooks what it records when that is first asked for.
        vars(child).pop("_output_capturing_hooks_installed", None)
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    return copied


def _in_place_of(own: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call` with the signature of the copy's forward, which transformers reads."""
    return update_wrapper(call, own.forward)


def _answer(module: nn.Module, own: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Return what a copy computes; it makes activations again where `module` is told to."""
    for theirs, ours in zip(module.modules(), own.modules(), strict=True):
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in vars(theirs):
                setattr(ours, name, vars(theirs)[name])
    return own.forward(*inputs, **options)


def _answer_rounded(
    block: nn.Module,
    own: nn.Module,
    dtypes: dict[str, torch.dtype],
    *inputs: Any,
    **options: Any,
) -> Any:
    """Return what a copy computes with its parameters rounded into `dtypes`."""

    def rounded(*inputs: Any, **options: Any) -> Any:
        parameters = {name: each.to(dtypes[name]) for name, each in own.named_parameters()}
        return functional_call(own, parameters, inputs, options)

    # Around the rounding: what is made again within it would not find it done.
    if vars(block).get("gradient_checkpointing") and own.training:
        return vars(block)["_gradient_checkpointing_func"](partial(rounded, **options), *inputs)
    return rounded(*inputs, **options)


def _dtypes_of(block: nn.Module, own: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the parameters of `block` by name.

    Layers that are quantized there have none, and take `dtype`.
    """
    dtypes = {name: dtype for name, _ in own.named_parameters()}
    return dtypes | {name: parameter.dtype for name, parameter in block.named_parameters()}
