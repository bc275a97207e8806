"""A model of which only one block is in memory, and hidden states that wait on disk."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import find_stacks, weight_at
from stillroom.errors import CorruptedError
from stillroom.models import Task, model_class, quiet, read_config, saved_dtype
from stillroom.quantization.capture import BlockCaller, Place, Rows
from stillroom.quantization.formats.folder import QuantizedFolder, TensorFiles, open_quantized
from stillroom.quantization.precision import MatmulPrecision, matmul_precision

Side = tuple[Any, ...] | None
LOGITS_AT_ONCE = 1 << 24


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
        self.mapping: list[Any] = get_model_conversion_mapping(model)
        self.sources = self._sources()  # every tensor of the files by its name in the model

    def load(self, prefix: str) -> None:
        """Read the tensors of one block."""
        self._load([key for name, key in self.sources if name.startswith(f"{prefix}.")])
        for name in [] if self.packed is None else self.packed.layers:
            if name.startswith(f"{prefix}."):
                self._place(name)

    def release(self, prefix: str) -> None:
        """Let go of the parameters of one block."""
        for module in self.model.get_submodule(prefix).modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
                setattr(module, name, empty)

    def load_rest(self, stacks: Mapping[str, nn.ModuleList]) -> None:
        """Read everything but the blocks.

        Raises:
            CorruptedError: the files lack a tensor.
        """
        inside = tuple(f"{prefix}." for prefix in stacks)
        self._load([key for name, key in self.sources if not name.startswith(inside)])
        for name in [] if self.packed is None else self.packed.layers:
            if not name.startswith(inside):
                self._place(name)
        self.model.tie_weights()
        missing = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and not name.startswith(inside)
        ]
        if missing:
            raise CorruptedError(
                f"{self.files.folder}: the tensors do not fit config.json; missing {missing[:3]}; "
                "write the checkpoint again"
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

    def _place(self, name: str) -> None:
        """Put the dequantized weight of a packed layer where the model has its own."""
        assert self.packed is not None
        weight = weight_at(self.model, name)
        if weight.stored.is_meta:
            whole = getattr(weight.module, weight.parameter)
            empty = nn.Parameter(torch.empty_like(whole, device=self.device), False)
            setattr(weight.module, weight.parameter, empty)
        weight.write(self.packed.weight(name).dequantize())


def open_streamed(
    folder: Path,
    *,
    task: Task,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, OnDisk]:
    """Return the model in `folder` with everything but its blocks in memory, and its blocks.

    Raises:
        SourceError: the folder holds no model.
        CorruptedError: tensors are missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    raw = read_config(folder)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class(task).from_config(
            config, dtype=dtype or saved_dtype(raw), trust_remote_code=trust_remote_code
        )
    blocks = OnDisk(model, folder, torch.device(device))
    blocks.load_rest(find_stacks(model))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.train(False)
    return model, blocks


class Activations:
    """Hidden states of all batches, one file each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def write(self, name: str | int, hidden: Tensor) -> None:
        """Keep a tensor under a name, in place of an older one."""
        from safetensors.torch import save_file

        save_file({"hidden": hidden.cpu().contiguous()}, self._path(name))

    def read(self, name: str | int, device: torch.device) -> Tensor:
        """Return the tensor that was kept under `name`."""
        from safetensors.torch import load

        # Through a buffer: a mapped file would count as memory as long as the tensor lives.
        return load(self._path(name).read_bytes())["hidden"].to(device)

    def has(self, name: str | int) -> bool:
        """Return whether anything was kept under `name`."""
        return self._path(name).exists()

    def delete(self) -> None:
        """Delete the folder and all that was kept."""
        shutil.rmtree(self.folder)

    def _path(self, name: str | int) -> Path:
        return self.folder / f"{name}.safetensors"


class Stream:
    """All batches on their way through the blocks, with the hidden states of each on disk."""

    def __init__(
        self,
        caller: BlockCaller,
        batches: list[Rows],
        folder: Path,
        precision: MatmulPrecision = "highest",
    ) -> None:
        self.caller = caller
        self.batches = batches
        self.precision = precision
        self.device = batches[0].ids.device
        folder.mkdir(exist_ok=True)
        self.hidden = {name: Activations(folder / name.replace(".", "-")) for name in caller.stacks}
        self.sides: list[dict[str, Side]] = [{} for _ in batches]
        self._finished: list[str] = []

    def enter(self) -> str:
        """Let every batch come to the first block of the next stack; return the stack's name."""
        for b, rows in enumerate(self.batches):
            stack, entry = self.caller.entry(rows, self._left(b), self.sides[b])
            self.hidden[stack].write(b, entry)
        return stack

    def run(self, place: Place, b: int) -> Tensor:
        """Return what the block makes of batch `b`, (rows, length, hidden), and leave it there."""
        hidden = self.hidden[place.stack].read(b, self.device)
        with matmul_precision(self.precision):
            output, side = self.caller.call(
                place, hidden, self.batches[b], self._left(b), self.sides[b]
            )
        self.sides[b].setdefault(place.stack, side)
        return output

    def advance(self, place: Place) -> list[Tensor]:
        """Let every batch go through a block; return the largest value of each, (1,)."""
        largest = []
        for b, rows in enumerate(self.batches):
            output = self.run(place, b)
            largest.append(output[rows.mask.bool()].abs().max())
            self.hidden[place.stack].write(b, output)
        return largest

    def leave(self, stack: str) -> None:
        """Say that all blocks of `stack` are done."""
        self._finished.append(stack)

    def logits(self, b: int) -> Tensor:
        """Return the model's logits for batch `b`; all stacks must be left."""
        return self.caller.finish(self.batches[b], self._left(b), self.sides[b])

    def _left(self, b: int) -> dict[str, Tensor]:
        return {name: self.hidden[name].read(b, self.device) for name in self._finished}


@torch.no_grad()
def streamed_logits(model: PreTrainedModel, blocks: Blocks, rows: Rows) -> Tensor:
    """Return the logits of some rows with one block at a time in memory."""
    caller = BlockCaller(model, find_stacks(model))
    with caller.entered(), TemporaryDirectory() as folder:
        stream = Stream(caller, [rows], Path(folder))
        for _ in caller.stacks:
            stack = stream.enter()
            for index in range(len(caller.stacks[stack])):
                prefix = f"{stack}.{index}"
                blocks.load(prefix)
                stream.advance(Place(stack, index))
                blocks.release(prefix)
            stream.leave(stack)
        return stream.logits(0)


def rows_to_check(model: Any, rows: Rows) -> Rows:
    """Return the first tokens of some rows: as many as there is room for 2^24 logits, at least one.

    Of an encoder-decoder, and where logits are few, they are all.
    """
    config = model.config
    if not hasattr(config, "vocab_size") or config.is_encoder_decoder:
        return rows
    length = min(rows.ids.shape[1], max(1, LOGITS_AT_ONCE // config.vocab_size))
    count = max(1, LOGITS_AT_ONCE // config.vocab_size // length)
    return Rows(rows.ids[:count, :length], rows.mask[:count, :length])
