"""Read the tensors of a model folder one at a time, packed or not, without building the model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from stillroom.errors import CorruptedError, MismatchError, SourceError
from stillroom.models import read_config
from stillroom.quantization.kernels.dequantization import PackedLinear, require_fit
from stillroom.quantization.packing import PARTS, WORD, CheckpointFormat, PackedWeight, unpack
from stillroom.quantization.weight import QuantizedWeight

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def places(self) -> dict[str, Path]:
        """The file that holds each tensor.

        Raises:
            SourceError: the folder holds no safetensors.
            CorruptedError: a file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        # As transformers does: an index beside the whole is of shards that nobody reads.
        pattern = WEIGHTS
        if not (self.folder / WEIGHTS).exists():
            if (self.folder / INDEX).exists():
                return self._indexed()
            pattern = "*model*.safetensors"  # auto-gptq: gptq_model-4bit-128g.safetensors
        places: dict[str, Path] = {}
        for path in sorted(self.folder.glob(pattern)):
            try:
                with safe_open(path, framework="pt") as file:
                    places |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CorruptedError(f"{path} cannot be read: {error}; write it again") from error
        if not places:
            raise SourceError(f"{self.folder} holds no weights: expected model.safetensors")
        return places

    def _indexed(self) -> dict[str, Path]:
        index = self.folder / INDEX
        try:
            listed: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptedError(
                f"{index} does not say which file holds which tensor ({error}); write it again"
            ) from error
        # Files elsewhere may be somebody else's.
        outside = [file for file in listed.values() if file != Path(str(file)).name]
        if outside:
            raise CorruptedError(
                f"{index} names {outside[0]}: expected files beside it; write it again"
            )
        return {name: self.folder / file for name, file in listed.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, read now."""
        from safetensors import SafetensorError, safe_open

        path = self.places[name]
        try:
            # Opened anew each time: an open file keeps all that was read of it in memory.
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptedError(f"{path} cannot be read: {error}; write it again") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.places)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.places)


@dataclass(frozen=True)
class QuantizedFolder:
    """A GPTQ checkpoint on disk: packed layers, and tensors that are as they were."""

    folder: Path
    config: dict[str, Any]
    checkpoint_format: CheckpointFormat
    files: TensorFiles

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The dotted names of the packed layers."""
        ending = ".qweight"
        return tuple(name.removesuffix(ending) for name in self.files if name.endswith(ending))

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """The names of the tensors that belong to no packed layer's weight."""
        packed = {f"{name}.{part}" for name in self.layers for part in PARTS}
        return tuple(name for name in self.files if name not in packed)

    def packed(self, name: str) -> tuple[PackedWeight, int]:
        """Return the packed tensors of a layer, and its bits.

        Raises:
            CorruptedError: one of its tensors is missing, or of another shape than the others say.
            MismatchError: its words are not of 32 bits.
        """
        missing = [part for part in PARTS if f"{name}.{part}" not in self.files]
        if missing:
            raise CorruptedError(
                f"{self.folder}: {name} lacks {', '.join(missing)}; write it again"
            )
        packed = PackedWeight(*(self.files[f"{name}.{part}"] for part in PARTS))
        if packed.qweight.dtype != torch.int32:
            raise MismatchError(
                f"{self.folder}: expected words of int32, {name} has {packed.qweight.dtype}; write "
                "it with pack_dtype int32"
            )
        # Layers may differ in bits; the shapes say which: 32-bit words against columns.
        bits = packed.qweight.shape[0] * WORD // packed.g_idx.shape[0]
        try:
            require_fit(PackedLinear(packed, None, bits, self.checkpoint_format))
        except CorruptedError as error:
            raise CorruptedError(f"{self.folder}, {name}: {error}") from error
        return packed, bits

    def weight(self, name: str) -> QuantizedWeight:
        """Return the integers, scales and zero points of a layer.

        Raises:
            CorruptedError, MismatchError: as `packed`.
            MismatchError: its columns are reordered (desc_act of other quantizers).
        """
        packed, bits = self.packed(name)
        return unpack(packed, bits, self.checkpoint_format)


def open_quantized(folder: Path) -> QuantizedFolder:
    """Return the GPTQ checkpoint in `folder`.

    Raises:
        SourceError: the folder holds none, or one of rotated weights.
    """
    config = read_config(folder)
    section = config.get("quantization_config", {})
    checkpoint_format = section.get("checkpoint_format", section.get("format", "gptq"))
    known: tuple[str, ...] = get_args(CheckpointFormat)
    if section.get("quant_method") != "gptq" or checkpoint_format not in known:
        raise SourceError(
            f"{folder}: expected a GPTQ checkpoint of format {' or '.join(known)}, got "
            f"{section.get('quant_method')} of format {checkpoint_format}; requantize the model"
        )
    if rotation := section.get("rotation"):
        raise SourceError(
            f"{folder}: its weights are rotated ({rotation}), so that activations have to be while "
            "it runs, which only gptqmodel does; quantize the model again without rotation"
        )
    return QuantizedFolder(folder, config, checkpoint_format, TensorFiles(folder))
