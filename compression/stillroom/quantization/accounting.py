"""What a quantized model has lost, in one place: figures for the report, and a bound."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stillroom.errors import StageError
from stillroom.quantization.capture import CalibrationRows, Rows
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import QuantizationResult, compared_rows
from stillroom.quantization.streaming import streamed_logits
from stillroom.quantization.weight import LayerAccount
from stillroom.streamed import Blocks


def summarise(accounts: Sequence[LayerAccount]) -> dict[str, float]:
    """Return the accounts of all layers as figures; errors are shares of the output's energy."""
    errors = sorted(account.relative_error for account in accounts)
    figures = {
        "quantized_layers": float(len(accounts)),
        "fallback_layers": float(sum(account.fell_back for account in accounts)),
        "median_relative_error": errors[len(errors) // 2],
        "largest_relative_error": errors[-1],
        "clipped_share": sum(a.clipped for a in accounts) / sum(a.weights for a in accounts),
        "refined_layers": float(sum(account.refined for account in accounts)),
        "dead_inputs": float(sum(account.dead_inputs for account in accounts)),
    }
    held_out = sorted(a.held_out_error for a in accounts if a.held_out_error is not None)
    if held_out:
        figures["median_held_out_error"] = held_out[len(held_out) // 2]
        figures["largest_held_out_error"] = held_out[-1]
    dampings = sorted(account.damping for account in accounts if account.damping > 0)
    if dampings:
        figures["median_damping"] = dampings[len(dampings) // 2]
        figures["largest_damping"] = dampings[-1]
    return figures


def original_nats(
    model: Any, blocks: Blocks, calibration: CalibrationRows, options: QuantizationOptions
) -> float:
    """Return a language model's negative log-likelihood on some calibration rows, nats a token.

    To be called before `quantize_model`, which rounds embeddings in place. The model no longer
    drops out afterwards; of its blocks one at a time is in memory.

    Raises:
        DataError: there are no calibration rows.
    """
    model.train(False)
    rows = compared_rows(model, calibration, options)
    return _nats(streamed_logits(model, blocks, rows), rows)


def require_perplexity(result: QuantizationResult, original: float, max_ratio: float) -> float:
    """Return the perplexity on some calibration rows over that of the original language model.

    `original` is what `original_nats` gave for it.

    Raises:
        StageError: it is above `max_ratio`, or no number; the message names the worst layer.
    """
    ratio = math.exp(min(_nats(result.logits, result.rows) - original, 700.0))
    if not ratio <= max_ratio:
        worst = max(result.accounts, key=_error)
        raise StageError(
            f"the quantized model's perplexity is {ratio:.4g} times the original's on calibration "
            f"rows, and quantization.max_perplexity_ratio is {max_ratio:g}; the layer that loses "
            f"most is {worst.name}, {100 * _error(worst):.3g} % of its output; give it more bits, "
            "list it under skip, or use more calibration text"
        )
    return ratio


def _error(account: LayerAccount) -> float:
    held_out = account.held_out_error
    return account.relative_error if held_out is None else held_out


def _nats(logits: Tensor, rows: Rows) -> float:
    """Return the mean negative log-likelihood of the rows, nats a token."""
    predicted = logits[:, :-1].float().log_softmax(-1)
    targets = rows.ids[:, 1:, None]
    nats = -predicted.gather(-1, targets)[..., 0]  # (rows, length - 1)
    real = rows.mask[:, 1:].bool()
    return float(nats[real].double().mean())
