"""What a recipe says about quantization, and whether a layer can be quantized so."""

from dataclasses import dataclass
from typing import Literal

from stillroom.errors import RecipeError
from stillroom.quantization.packing import values_per_unit

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class QuantizationOptions:
    """How the weights of a linear layer become integers."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 64  # columns that share a scale; -1: all of a row
    symmetric: bool = False
    act_order: bool = True  # columns with the largest inputs first
    damping: float = 0.05  # share of the mean of the Hessian's diagonal
    block_size: int = 128  # columns between two updates of all that follow
    method: Method = "gptq"
    weighted_grid: bool = True  # search scales that minimise the error weighted by the Hessian
    true_sequential: bool = True  # in a block, calibrate behind the layers already quantized

    def group_columns(self, in_features: int) -> int:
        """Return how many columns share a scale in a layer with so many inputs."""
        return in_features if self.group_size == -1 else self.group_size


def check_fits(
    options: QuantizationOptions, out_features: int, in_features: int, name: str
) -> None:
    """Refuse a layer that the options or the GPTQ checkpoint format cannot hold.

    Raises:
        RecipeError: the group size does not divide the inputs, or rows do not fill whole words.
    """
    group = options.group_size
    if group != -1 and (group < 2 or in_features % group):
        usable = [str(size) for size in _group_sizes(in_features, near=group)]
        raise RecipeError(
            f"group_size must divide in_features: {group} does not divide {in_features} ({name}); "
            f"use {', '.join([*usable, ''])[:-2]} or -1 for one group per row"
        )
    unit = values_per_unit(options.bits)
    for side, size in (("in_features", in_features), ("out_features", out_features)):
        if size % unit:
            raise RecipeError(
                f"{side} must be a multiple of {unit} at {options.bits} bits: {name} has {size}; "
                f"use other bits, or list the layer under skip"
            )


def _group_sizes(in_features: int, near: int) -> list[int]:
    """Return up to three group sizes that divide `in_features`, those nearest to what was asked."""
    divisors = [size for size in range(16, in_features) if in_features % size == 0]
    preferred = [size for size in divisors if size % 32 == 0] or divisors
    return sorted(sorted(preferred, key=lambda size: abs(size - near))[:3])
