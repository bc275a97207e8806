"""Measure what each layer of a checkpoint that somebody else quantized lost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import LinearWeight, find_weights
from stillroom.errors import MismatchError
from stillroom.quantization.formats.folder import QuantizedFolder
from stillroom.quantization.weight import QuantizedWeight


@dataclass
class Loss:
    """What was measured of one layer while the calibration rows passed."""

    weight: QuantizedWeight
    original: Tensor  # (out, in) float32
    energy: float = 0.0  # squared norm of the outputs of the original weight
    lost: float = 0.0  # squared norm of their change
    largest_inputs: Tensor | float = 0.0  # (in,)

    @property
    def relative_error(self) -> float:
        """Return the share of the output's energy that is lost."""
        return self.lost / self.energy if self.energy > 0 else 0.0

    @property
    def clipped(self) -> int:
        """Return how many original weights lie beyond their grid by more than half a step."""
        out = self.original.shape[0]
        grouped = self.original.view(out, -1, self.weight.group_size)  # (out, groups, group)
        scales, zeros = (
            each.float()[..., None] for each in (self.weight.scales, self.weight.zeros)
        )
        middle = (2**self.weight.bits - 1) / 2
        beyond = (grouped / scales + zeros - middle).abs() > middle + 0.5 + 1e-3
        return int(beyond.sum())


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel, result: QuantizedFolder, rows: list[Tensor]
) -> dict[str, Loss]:
    """Write the weights of `result` into `model`, in place, and measure each layer's loss.

    Raises:
        MismatchError: the model has no such layer, or one of another shape.
    """
    # An expert's inputs are not its module's.
    weights = {name: each for name, each in find_weights(model).items() if each.expert is None}
    losses: dict[str, Loss] = {}
    for name in result.layers:
        weight = result.weight(name)
        if name not in weights or weights[name].shape != weight.integers.shape:
            raise MismatchError(
                f"{result.folder} holds {name}, which is no linear layer of {type(model).__name__} "
                f"of these shapes as transformers loads it; use the engine stillroom"
            )
        losses[name] = Loss(weight, weights[name].read().clone())
        weights[name].write(weight.dequantize())
    hooks = [
        weights[name].module.register_forward_pre_hook(_measure(loss, weights[name]))
        for name, loss in losses.items()
    ]
    try:
        for row in rows:
            model(input_ids=row[None].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return losses


def _measure(loss: Loss, weight: LinearWeight) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that adds what a layer's inputs say of its loss."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].flatten(0, -2)  # (tokens, in)
        loss.energy += float((inputs @ loss.original.T).square().sum(dtype=torch.float64))
        delta = loss.original - weight.read()
        loss.lost += float((inputs @ delta.T).square().sum(dtype=torch.float64))
        loss.largest_inputs = torch.maximum(
            inputs.abs().amax(0), torch.as_tensor(loss.largest_inputs, device=inputs.device)
        )

    return hook
