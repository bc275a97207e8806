"""The parameters that are trained, and their optimizer."""

import torch
from torch import nn

from stillroom.errors import RecipeError, StageError
from stillroom.training.options import TrainingOptions


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; tied ones once.

    Raises:
        RecipeError: some are float16, in which AdamW's steps overflow or are rounded to nothing.
        StageError: there is none.
    """
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise StageError("training: no parameter of the model requires a gradient; unfreeze some")
    half = [name for name, value in found.items() if value.dtype == torch.float16]
    if half:
        raise RecipeError(
            f"training: parameters in float32 or bfloat16 expected, {len(half)} of {len(found)} "
            f"are float16 ({half[0]} first), in which AdamW's steps overflow or are rounded to "
            "nothing; set teacher.dtype to float32 or bfloat16, or load the model so"
        )
    return found


def adamw(parameters: dict[str, nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """Return AdamW over the parameters, by their names; weight decay is for matrices alone."""
    # Biases and norm scales have one dimension, and decay would only pull them off their place.
    decayed = [value for value in parameters.values() if value.dim() > 1]
    others = [value for value in parameters.values() if value.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.learning_rate, fused=True
    )
