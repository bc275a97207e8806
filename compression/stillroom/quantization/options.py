"""What a recipe says about quantization, and whether a layer can be quantized so."""

from dataclasses import dataclass
from typing import Literal

from stillroom.errors import RecipeError
from stillroom.quantization.packing import values_per_unit
from stillroom.quantization.precision import MatmulPrecision

Method = Literal["gptq", "obq", "rtn"]
Bits = Literal[2, 3, 4, 8]
# Where there is no held-out text to choose the damping on.
DEFAULT_DAMPING = 0.1


@dataclass(frozen=True)
class QuantizationOptions:
    """How the weights of a linear layer become integers. The defaults are what measured best."""

    bits: Bits = 4
    group_size: int = 64  # columns that share a scale; -1: all of a row
    symmetric: bool = False
    act_order: bool = True  # columns with the largest inputs first
    damping: float | None = None  # share of the mean of the Hessian's diagonal; None: chosen
    block_size: int = 128  # columns between two updates of all that follow
    batch_rows: int = 4  # calibration rows in one forward pass; sums are rounded accordingly
    method: Method = "gptq"
    weighted_grid: bool = True  # search scales that minimise the error weighted by the Hessian
    true_sequential: bool = True  # in a block, calibrate behind the layers already quantized
    refinements: int = 2  # rounds of coordinate descent and refitted scales after GPTQ
    cross_layer: bool = True  # let a layer make good what the layers before it lost
    embedding_bits: Literal[8] | None = None  # of input embeddings and head; None: as they are
    bias_correction: bool = True  # let a bias take up the mean of what rounding loses
    matmul_precision: MatmulPrecision = "medium"  # torch's, of the calibration rows' products

    def group_columns(self, in_features: int) -> int:
        """Return how many columns share a scale in a layer with so many inputs."""
        return in_features if self.group_size == -1 else self.group_size

    @property
    def wants_held_out_rows(self) -> bool:
        """Whether anything is chosen on calibration rows that were kept apart."""
        return self.method == "gptq" and (
            self.damping is None or self.refinements > 0 or self.cross_layer
        )


def plain(options: QuantizationOptions) -> QuantizationOptions:
    """Return the options of GPTQ as its paper has it: nothing searched, nothing refined."""
    from dataclasses import replace

    return replace(
        options,
        act_order=False,
        damping=0.01,
        weighted_grid=False,
        true_sequential=False,
        refinements=0,
        cross_layer=False,
        bias_correction=False,
    )


def check_fits(
    options: QuantizationOptions, out_features: int, in_features: int, name: str
) -> None:
    """Refuse a layer that the options or the GPTQ checkpoint format cannot hold.

    Raises:
        RecipeError: the group size does not divide the inputs, or rows do not fill whole words.
    """
    group = options.group_size
    if group != -1 and (group < 2 or in_features % group):
        usable = ", ".join(str(size) for size in _group_sizes(in_features, near=group))
        raise RecipeError(
            f"group_size must divide in_features: {group} does not divide {in_features} ({name}); "
            f"use {usable}{' or ' if usable else ''}-1 for one group per row"
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
