"""One short forward pass through a base, to see what its modules do."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def short_pass(base: Any, ids: Tensor) -> Any:
    """Return what the backbone of `base` makes of the words `ids` (rows, length), dropout off.

    A head is left out: it has no blocks, and it may want more than words.
    """
    backbone = getattr(base, "base_model", base)
    ids = ids.to(next(base.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        return backbone(**inputs)
    finally:
        for module, training in modes:
            module.training = training


def key_of(name: str) -> str:
    """Return what a module is called in a ModuleDict, where no name may hold a dot."""
    return name.replace(".", "/")


def device_of(module: nn.Module) -> torch.device:
    """Return where a layer's tensors are: a quantized one has buffers alone."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
