"""Choose each layer's bits under a budget of bytes, by what the model's outputs lose."""

from collections.abc import Sequence
from typing import Any

import torch

from stillroom.blocks import LinearWeight, find_stacks, find_weights
from stillroom.progress import Progress, silent
from stillroom.quantization.allocation import (
    Allocation,
    LayerChoice,
    Repair,
    allocate,
    layer_options,
    repair,
)
from stillroom.quantization.divergence import Rows, kl_measure
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sensitivity import measure_costs, replaced, rounding, tied_layers

# Tokens of the one row from which it is read which layers share an input.
PROBE_TOKENS = 8


@torch.no_grad()
def choose_bits(
    model: Any,
    rows: Rows,
    options: QuantizationOptions,
    offers: Sequence[LayerChoice],
    max_bytes: int,
    *,
    tokens: int = 256,
    progress: Progress = silent,
) -> tuple[dict[str, QuantizationOptions], Repair]:
    """Return the options of every layer in the blocks, and how they were found.

    Each choice is measured as the KL divergence of the outputs with only these layers rounded;
    the knapsack takes the best sum within `max_bytes`, and swaps judged on all layers together
    mend what the sum did not foresee. Layers with the same input get the same choice. The whole
    model is in memory, and is as before afterwards.

    Raises:
        RecipeError: the budget is below the smallest possible, or no offer fits a layer.
        DataError: there are no rows.
    """
    weights: dict[str, LinearWeight] = {
        f"{stack}.{index}.{name}": weight
        for stack, blocks in find_stacks(model).items()
        for index, block in enumerate(blocks)
        for name, weight in find_weights(block).items()
    }
    probe = slice(0, PROBE_TOKENS)
    groups = tied_layers(
        model, list(weights), rows.input_ids[:1, probe], rows.attention_mask[:1, probe]
    )
    measure, quantize = kl_measure(model, rows, tokens=tokens), rounding(options)
    choices = list(measure_costs(weights, groups, offers, measure, quantize, progress=progress))
    with replaced(weights, quantize) as replace_by:

        def joint(allocation: Allocation) -> float:
            replace_by(allocation.layers)
            return measure(allocation.layers)

        found = repair(choices, allocate(choices, max_bytes), max_bytes, joint)
    return layer_options(found.allocation.layers, options), found
