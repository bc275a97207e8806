"""Read a written GGUF back, and compare it with the checkpoint that it was made from."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import CorruptedError
from stillroom.quantization.formats.gguf_tensors import ROWS_AT_ONCE, open_reordered
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
            error, steps = _layer_error(came, weight)
            largest = max(largest, error)
            if error:
                inexact[place.source] = steps
        else:
            largest_plain = max(largest_plain, _plain_error(came, tensors.plain(place)))
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


def _layer_error(stored: Any, weight: QuantizedWeight) -> tuple[float, float]:
    """Return the largest error of a layer, and the largest as a share of its group's scale."""
    largest = in_steps = 0.0
    for start, values in _values(stored, weight.integers.shape):
        end = start + len(values)
        scales = weight.scales[start:end]
        part = QuantizedWeight(
            weight.integers[start:end], scales, weight.zeros[start:end], weight.bits
        )
        error = (values - part.dequantize()).abs()
        largest = max(largest, float(error.max()))
        grouped = error.view(*scales.shape, -1).amax(-1)  # (rows, groups)
        smallest = torch.finfo(torch.float16).smallest_normal
        in_steps = max(in_steps, float((grouped / scales.float().clamp_min(smallest)).max()))
    return largest, in_steps


def _plain_error(stored: Any, tensor: Tensor) -> float:
    """Return the largest error of a tensor that is not packed."""
    return max(
        float((values - tensor[start : start + len(values)].float()).abs().max())
        for start, values in _values(stored, tensor.shape)
    )


def _values(stored: Any, shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the rows of a tensor of the file in float32, some at a time.

    Raises:
        CorruptedError: it is of another shape.
    """
    import gguf

    if tuple(reversed(stored.shape.tolist())) != tuple(shape):
        raise CorruptedError(
            f"expected {stored.name} of shape {tuple(shape)} in the GGUF; "
            f"{tuple(reversed(stored.shape.tolist()))} came; export it again"
        )
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = stored.data[start : start + ROWS_AT_ONCE]
        yield start, torch.from_numpy(gguf.dequantize(rows, stored.tensor_type).copy())
