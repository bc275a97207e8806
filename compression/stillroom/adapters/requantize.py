"""Merge a LoRA into a quantized base: merge, quantize again, and measure what that costs."""

from dataclasses import dataclass
from typing import Any

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.merge import merge_lora
from stillroom.checkpoint import Checkpoints
from stillroom.data.examples import Examples
from stillroom.errors import StageError
from stillroom.fine_tuning import measure
from stillroom.progress import Progress, silent
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import QuantizationResult, quantize_model
from stillroom.training.history import HELD_OUT_LOSS


@dataclass(frozen=True)
class Merged:
    """A model in whose quantized weights an adapter is, and its loss on held-out rows, in nats.

    `beside` is that of the adapter beside the quantized base.
    """

    model: Any
    result: QuantizationResult
    beside: float
    inside: float

    @property
    def added_nats(self) -> float:
        """What merging and quantizing again has added to the loss, in nats a prediction."""
        return self.inside - self.beside


def merge_requantized(
    adapted: AdaptedModel,
    name: str,
    calibration: Examples,
    held_out: Examples,
    options: QuantizationOptions,
    *,
    skip: tuple[str, ...] = (),
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> Merged:
    """Return a quantized base, loaded dense, with the LoRA `name` in its weights, changed in place.

    The sum of a grid and a low-rank matrix lies on no grid: it is quantized anew, on rows of the
    adapter's own text. The whole dense model is in memory meanwhile.

    Raises:
        MismatchError: the adapter is no LoRA, or the base is packed.
    """
    adapted.select(name)
    beside = measure(adapted, held_out, options.batch_rows)[HELD_OUT_LOSS]
    model = merge_lora(adapted, name)
    # Dequantized, it may not say of itself that it is quantized.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    result = quantize_model(
        model, calibration, options, skip=skip, checkpoints=checkpoints, progress=progress
    )
    inside = measure(model, held_out, options.batch_rows)[HELD_OUT_LOSS]
    return Merged(model, result, beside, inside)


def require_little_added(merged: Merged, max_added_nats: float, name: str) -> None:
    """Refuse a merged model that lost more than the recipe allows.

    Raises:
        StageError: it did, or its loss is no number.
    """
    # Written so that a loss that is no number is refused too.
    if not merged.added_nats <= max_added_nats:
        raise StageError(
            f"adapter {name}: merged and quantized again, the held-out loss is "
            f"{merged.inside:.4g} nats, beside the base it is {merged.beside:.4g}; that adds "
            f"{merged.added_nats:.3g}, and merge.max_added_nats is {max_added_nats:g}; serve the "
            "adapter beside its base, take more bits, or allow more"
        )
