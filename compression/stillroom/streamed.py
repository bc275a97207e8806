"""A model of which only those blocks are in memory that are needed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import LinearWeight, find_stacks
from stillroom.errors import CorruptedError
from stillroom.models import Task, load_config, new_model, quiet, read_config, saved_dtype
from stillroom.quantization.formats.experts import Parts, plain_experts
from stillroom.quantization.formats.folder import QuantizedFolder, TensorFiles, open_quantized
from stillroom.quantization.formats.places import fill, place_of


class Blocks(Protocol):
    """Where the weights of a model's blocks come from, and when they are in memory."""

    def load(self, prefix: str) -> None:
        """Make the block with this dotted name ready to run, with its original weights."""

    def release(self, prefix: str) -> None:
        """Let go of its weights."""


class InMemory:
    """The blocks of a model that is in memory as a whole."""

    def load(self, prefix: str) -> None:
        """Do nothing: the weights are there."""

    def release(self, prefix: str) -> None:
        """Do nothing: whatever became of them stays in the model."""


class OnDisk:
    """The blocks of a model without weights, each read from its checkpoint when it is needed.

    transformers' own loader places the tensors, so that files whose layout differs from the
    model's (mixtures, renamed parts) are read as `from_pretrained` reads them. Packed layers of a
    GPTQ checkpoint are dequantized.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self.device = device
        self.files = TensorFiles(folder)
        self.packed: QuantizedFolder | None = None
        if "quantization_config" in read_config(folder):
            self.packed = open_quantized(folder)
        self.experts = {} if self.packed is None else plain_experts(model, self.packed.plain)
        self.mapping: list[Any] = get_model_conversion_mapping(model)
        self.sources = self._sources()  # every tensor of the files by its name in the model

    def load(self, prefix: str) -> None:
        """Read the tensors of one block.

        Raises:
            CorruptedError: the files lack one, or hold one of another shape.
        """
        self._read(lambda name: name.startswith(f"{prefix}."))

    def release(self, prefix: str) -> None:
        """Let go of the parameters of one block."""
        for module in self.model.get_submodule(prefix).modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
                setattr(module, name, empty)

    def load_rest(self, stacks: Mapping[str, nn.ModuleList]) -> None:
        """Read everything but the blocks.

        Raises:
            CorruptedError: the files lack a tensor, or hold one of another shape.
        """
        inside = tuple(f"{prefix}." for prefix in stacks)
        self._read(lambda name: not name.startswith(inside))

    def _read(self, wanted: Callable[[str], bool]) -> None:
        """Read the tensors of all parameters and layers whose names are wanted."""
        plain = [(name, key) for name, key in self.sources if wanted(name)]
        self._load([key for _, key in plain])
        parts = Parts()
        if self.packed is not None:
            for name in filter(wanted, self.packed.layers):
                parts.add(name, self._place(name, self.packed.weight(name).dequantize()))
        for key, name in self.experts.items():
            if wanted(name):
                parts.add(name, self._place(name, self.files[key]))
        self.model.tie_weights()
        empty = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and wanted(name)
        ]
        # What is still empty although it came is of another shape.
        missing = {*empty, *({*parts.lacking} - {name for name, _ in plain})}
        if missing:
            raise CorruptedError(
                f"{self.files.folder}: the tensors do not fit config.json; missing "
                f"{sorted(missing)[:3]}, or of another shape; write the checkpoint again"
            )

    def _sources(self) -> list[tuple[str, str]]:
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        renamings = [each for each in self.mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in self.mapping if isinstance(each, WeightConverter)]
        own = self.model.state_dict()
        prefix = self.model.base_model_prefix
        keys = self.files if self.packed is None else self.packed.plain
        return [
            (
                key
                if key in own
                else rename_source_key(key, renamings, converters, prefix, own)[0],
                key,
            )
            for key in keys
            if key not in self.experts
        ]

    def _load(self, keys: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            weight_mapping=self.mapping, device_map={"": self.device}, dtype=self.model.dtype
        )
        state = {key: self.files[key] for key in keys}
        with quiet():
            convert_and_load_state_dict_in_model(self.model, state, config)

    def _place(self, name: str, values: Tensor) -> LinearWeight:
        """Put the weight of a layer, (out, in), where the model has its own; return where."""
        weight = place_of(self.model, name, self.files.folder)
        if weight.stored.is_meta:
            whole = getattr(weight.module, weight.parameter)
            empty = nn.Parameter(torch.empty_like(whole, device=self.device), False)
            setattr(weight.module, weight.parameter, empty)
        fill(weight.read(), values, name, self.files.folder)
        return weight


def open_streamed(
    folder: Path,
    *,
    task: Task,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[PreTrainedModel, OnDisk]:
    """Return the model in `folder` with everything but its blocks in memory, and its blocks.

    Raises:
        SourceError: the folder holds no model.
        CorruptedError: tensors are missing.
    """
    from accelerate import init_empty_weights

    raw = read_config(folder)
    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = new_model(
            folder, config, task=task, dtype=dtype or saved_dtype(raw)
        )
    blocks = OnDisk(model, folder, torch.device(device))
    blocks.load_rest(find_stacks(model))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.train(False)
    return model, blocks
