"""What makes the embeddings of virtual tokens while they are trained (P-tuning, 2103.10385)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.adapters.options import PTuningOptions
from stillroom.training.options import derived_seed


class PromptEncoder(nn.Module):
    """Trainable inputs, and a network that makes embeddings of them, both (count, hidden).

    `lstm`: two bidirectional layers and an MLP of two, as the paper's section 3.2; `mlp`: three
    linear layers.
    """

    def __init__(self, hidden: int, count: int, options: PTuningOptions, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derived_seed(seed, "p_tuning"))
        self.inputs = nn.Parameter(torch.randn((count, hidden), generator=generator))
        width = options.encoder_width
        self.lstm: nn.LSTM | None = None
        widths = [hidden, width, width, hidden]
        if options.encoder == "lstm":
            self.lstm = _drawn(generator, nn.LSTM, hidden, width, num_layers=2, bidirectional=True)
            widths = [2 * width, 2 * width, hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [_drawn(generator, nn.Linear, inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        """Return the embeddings (count, hidden), in float32."""
        hidden: Tensor = self.inputs
        if self.lstm is not None:
            hidden, _ = self.lstm(hidden)
        embeddings: Tensor = self.mlp(hidden)
        return embeddings


def _drawn(generator: torch.Generator, kind: Any, inputs: int, outputs: int, **options: Any) -> Any:
    """Return a module as torch starts it, but drawn from `generator`."""
    with torch.device("meta"):  # or the global random state would move
        module = kind(inputs, outputs, dtype=torch.float32, **options)
    module.to_empty(device="cpu")
    bound = (outputs if kind is nn.LSTM else inputs) ** -0.5
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return module
