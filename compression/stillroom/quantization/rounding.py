"""Round-to-nearest: every weight on its own, the baseline that needs no text."""

import torch
from torch import Tensor

from stillroom.quantization.grid import find_grid
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.weight import QuantizedWeight, Solution, relative_output_error


def round_to_nearest(W: Tensor, options: QuantizationOptions, H: Tensor | None = None) -> Solution:
    """Return W, (out, in), rounded on grids that span each group's smallest and largest weight.

    H, (in, in), only serves to measure the error; without it the inputs count as independent.
    """
    W = W.float()
    out, columns = W.shape
    group = options.group_columns(columns)
    rows = W.reshape(-1, group)  # (out * groups, group)
    grid = find_grid(rows, options.bits, options.symmetric)
    weight = QuantizedWeight(
        integers=grid.quantize(rows).to(torch.uint8).view(out, columns),
        scales=grid.scale.half().view(out, -1),
        zeros=grid.zero.to(torch.uint8).view(out, -1),
        bits=options.bits,
    )
    if H is None:
        H = torch.eye(columns, device=W.device)
    return Solution(
        weight=weight,
        relative_error=relative_output_error(W, weight, H),
        damping=0.0,
        clipped=int(grid.clipped(rows).sum()),
    )
