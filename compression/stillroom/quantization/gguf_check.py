"""Read a written GGUF back, and compare it with the checkpoint that it was made from."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import CorruptedError
from stillroom.quantization.gguf_tensors import open_reordered
from stillroom.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class GgufReport:
    """What a GGUF holds, and how far its weights are from the checkpoint's."""

    architecture: str
    size_bytes: int
    layers: dict[str, int]  # how many, by bits and type: "3-bit as Q4_0"
    types: dict[str, int]  # how many tensors of each type
    inexact_layers: dict[str, float]  # largest error of each, in steps of its grid
    largest_weight_error: float  # of the quantized layers
    largest_error_steps: float  # the same in steps of the grid: 0.5 is the error of rounding
    largest_embedding_error: float  # of what was no quantized layer


def compare_gguf(folder: Path, file: Path) -> GgufReport:
    """Return how the weights in `file` differ from those of the GPTQ checkpoint in `folder`.

    One tensor of each is in memory at a time.

    Raises:
        CorruptedError: a tensor is missing in the file, or of another shape.
    """
    from gguf import GGUFReader

    tensors = open_reordered(folder)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    layers: Counter[str] = Counter()
    inexact: dict[str, float] = {}
    largest = largest_plain = 0.0
    for place in tensors.places():
        if place.name not in stored:
            raise CorruptedError(f"{file} lacks {place.name}; export it again")
        came = stored[place.name]
        if place.packed:
            weight = tensors.weight(place.source)
            layers[f"{weight.bits}-bit as {came.tensor_type.name}"] += 1
            error = (_values(came, file) - weight.dequantize()).abs()
            largest = max(largest, float(error.max()))
            if error.any():
                inexact[place.source] = _in_steps(error, weight)
        else:
            error = _values(came, file) - tensors.plain(place).float()
            largest_plain = max(largest_plain, float(error.abs().max()))
    return GgufReport(
        architecture=tensors.architecture.name,
        size_bytes=file.stat().st_size,
        layers=dict(layers),
        types=dict(Counter(tensor.tensor_type.name for tensor in stored.values())),
        inexact_layers=inexact,
        largest_weight_error=largest,
        largest_error_steps=max(inexact.values(), default=0.0),
        largest_embedding_error=largest_plain,
    )


def _values(stored: Any, file: Path) -> Tensor:
    """Return a tensor of the file in float32, its dimensions as in torch."""
    import gguf

    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    return values.view(*reversed(stored.shape.tolist()))


def _in_steps(error: Tensor, weight: QuantizedWeight) -> float:
    """Return the largest error (out, in) as a share of its group's scale."""
    grouped = error.view(*weight.scales.shape, -1).amax(-1)  # (out, groups)
    scales = weight.scales.float()
    return float((grouped / scales.clamp_min(torch.finfo(torch.float16).smallest_normal)).max())
