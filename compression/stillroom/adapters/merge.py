"""Merge an adapter into its base: one dense model, as fast as the base alone."""

from typing import TYPE_CHECKING

from torch import nn

from stillroom.adapters.lora import is_quantized
from stillroom.errors import MismatchError, NotFiniteError

if TYPE_CHECKING:
    from peft import PeftModel


def merge_lora(adapted: "PeftModel") -> nn.Module:
    """Return the base, changed in place, with W + B A · alpha / rank in place of each W.

    Raises:
        MismatchError: the base is quantized, and the sum would lie on no grid.
        NotFiniteError: a merged weight is NaN or infinite.
    """
    if is_quantized(adapted):
        raise MismatchError(
            "merging needs a dense base, and this one is quantized: load it with weights='dense', "
            "and quantize the merged model again if it must be small"
        )
    try:
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise NotFiniteError(
            f"merging: expected finite weights ({error}); train the adapter again"
        ) from error
    return merged
