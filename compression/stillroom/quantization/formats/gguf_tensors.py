"""What of a checkpoint goes where in a GGUF: names, order of rows, and the bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.models import load_config
from stillroom.quantization.formats.folder import QuantizedFolder, open_quantized
from stillroom.quantization.formats.gguf_architectures import (
    Architecture,
    find_architecture,
    row_order,
    tensor_names,
)
from stillroom.quantization.formats.gguf_blocks import BLOCK
from stillroom.quantization.weight import QuantizedWeight
from stillroom.remote_code import refuse_own_code

PlainType = Literal["F32", "F16", "Q8_0"]
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"
# What older checkpoints hold though it is computed from the config.
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attention.bias")
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF and the layer or tensor of the checkpoint that it holds."""

    name: str
    source: str
    packed: bool


class Reordered:
    """A checkpoint's tensors as llama.cpp wants them, one at a time."""

    def __init__(
        self, checkpoint: QuantizedFolder, architecture: Architecture, config: Any
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.config = config

    def places(self) -> list[Place]:
        """Return every tensor that the GGUF has, in the order of the checkpoint.

        Raises:
            MismatchError: GGUF has no place for one of them.
        """
        name_of = tensor_names(self.architecture, self.config.num_hidden_layers)
        layers = self.checkpoint.layers
        found = [Place(name_of(f"{layer}.weight"), layer, True) for layer in layers]
        for name in self.checkpoint.plain:
            if not name.endswith(COMPUTED):
                found.append(Place(name_of(name), name, False))
        named = {place.name: place for place in found}
        if len(named) < len(found):
            raise MismatchError(
                f"{self.checkpoint.folder}: expected one tensor for each of a "
                f"{self.architecture.name}'s; two have the same place; serve the GPTQ checkpoint "
                f"itself"
            )
        if self.architecture.own_output and EMBEDDINGS[1] not in named:
            tied = named[EMBEDDINGS[0]]
            found.append(Place(EMBEDDINGS[1], tied.source, tied.packed))
        return found

    def weight(self, layer: str) -> QuantizedWeight:
        """Return a packed layer, its rows in llama.cpp's order."""
        weight = self.checkpoint.weight(layer)
        order = row_order(self.architecture, self.config, layer, weight.integers.shape[0])
        if order is None:
            return weight
        return QuantizedWeight(
            weight.integers[order], weight.scales[order], weight.zeros[order], weight.bits
        )

    def plain(self, place: Place) -> Tensor:
        """Return a tensor that is not packed, (rows, columns) or (rows,), in its saved dtype."""
        tensor = self.checkpoint.files[place.source]
        matrix = tensor.dim() == 2 and place.name not in (*EMBEDDINGS, POSITIONS)
        if self.architecture.transposed and matrix:
            tensor = tensor.T
        layer = place.source.rpartition(".")[0]
        order = row_order(self.architecture, self.config, layer, tensor.shape[0])
        if order is not None:
            tensor = tensor[order]
        if self.architecture.norm_offset and place.name.endswith("_norm.weight"):
            tensor = tensor.float() + self.architecture.norm_offset
        return tensor


def open_reordered(folder: Path) -> Reordered:
    """Return the GPTQ checkpoint in `folder` as llama.cpp wants it.

    Raises:
        SourceError: the folder holds none.
        MismatchError: llama.cpp does not run its architecture.
    """
    checkpoint = open_quantized(folder)
    refuse_own_code(folder, "llama.cpp")
    config = load_config(folder)
    return Reordered(checkpoint, find_architecture(config), config)


def plain_type(name: str, tensor: Tensor, embeddings: PlainType) -> PlainType:
    """Return the type in which a tensor that is not packed is stored.

    Vectors stay as they are. So do the matrices of layers that were left out of the quantization:
    in 16 bits where these hold all of them. Embeddings and head take what `embeddings` says.
    """
    if tensor.dim() == 1 or name == POSITIONS:
        return "F32"
    if name in EMBEDDINGS:
        whole = tensor.shape[1] % BLOCK == 0
        return embeddings if whole or embeddings != "Q8_0" else "F16"
    return (
        "F16" if all(torch.equal(rows.half().float(), rows) for rows in _chunks(tensor)) else "F32"
    )


def encode_plain(tensor: Tensor, kind: PlainType) -> NDArray[Any]:
    """Return a tensor as GGUF stores it: floats, or bytes (rows, bytes of a row) for Q8_0."""
    import gguf

    match kind:
        case "F32":
            return tensor.float().contiguous().numpy()
        case "F16":
            return tensor.half().contiguous().numpy()
        case "Q8_0":
            parts = [
                gguf.quantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
                for rows in _chunks(tensor)
            ]
            return np.concatenate(parts)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Iterate over a matrix by rows, in float32."""
    for start in range(0, tensor.shape[0], ROWS_AT_ONCE):
        yield tensor[start : start + ROWS_AT_ONCE].float()
