"""On which devices a model lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """On which devices a model lies, by accelerate's device map.

    "auto" fills the GPUs, then memory, then the disk, where `offloaded` is the folder.
    """

    device_map: str | dict[str, int | str]
    offloaded: Path


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model takes its inputs on, and leaves its outputs on."""
    laid_out: dict[str, Any] = getattr(model, "hf_device_map", {})
    computing = [device for device in laid_out.values() if device not in ("cpu", "disk")]
    if laid_out:
        return torch.device(computing[0] if computing else "cpu")
    return next(model.parameters()).device
