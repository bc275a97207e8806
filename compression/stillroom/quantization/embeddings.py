"""Store embeddings and head in 8 bits, which cost little: small models are mostly those."""

from typing import Any

import torch
from torch import nn

from stillroom.errors import RecipeError
from stillroom.quantization.options import QuantizationOptions, check_fits
from stillroom.quantization.rounding import round_to_nearest
from stillroom.quantization.weight import QuantizedWeight

# The group that GGUF's Q8_0 has, so that its export is exact.
GROUP = 32


@torch.no_grad()
def round_embeddings(model: Any) -> dict[str, QuantizedWeight]:
    """Round the input embeddings and the head, in place, and return them by dotted name.

    Rows are tokens; each is cut into groups of 32 on symmetric grids of 8 bits. A head that is tied
    to the embeddings is the same matrix and stands there once.

    Raises:
        RecipeError: the width is no multiple of 32, or the vocabulary none of 4.
    """
    names = {module: name for name, module in model.named_modules()}
    rounded: dict[str, QuantizedWeight] = {}
    done: set[int] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(module, nn.Embedding | nn.Linear) or module.weight.data_ptr() in done:
            continue
        options = QuantizationOptions(8, GROUP, symmetric=True)
        out, columns = module.weight.shape
        try:
            check_fits(options, out, columns, names[module])
        except RecipeError as error:
            raise RecipeError(f"{error}; or leave out embedding_bits") from error
        weight = round_to_nearest(module.weight, options).weight
        module.weight.copy_(weight.dequantize())
        done.add(module.weight.data_ptr())
        rounded[names[module]] = weight
    return rounded
