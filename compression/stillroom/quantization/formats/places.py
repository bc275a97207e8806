"""Where a checkpoint's tensors go in a model, which has to have room of the same shape for each."""

from pathlib import Path

from torch import Tensor, nn

from stillroom.blocks import LinearWeight, weight_at
from stillroom.errors import CorruptedError


def place_of(model: nn.Module, name: str, folder: Path) -> LinearWeight:
    """Return the weight of the layer `name`.

    Raises:
        CorruptedError: the model has no such layer.
    """
    try:
        return weight_at(model, name)
    except (AttributeError, ValueError) as error:
        raise CorruptedError(
            f"{folder}: the model of config.json has no layer {name}; write the checkpoint again"
        ) from error


def fill(own: Tensor, came: Tensor, name: str, folder: Path) -> None:
    """Copy what came as `name` into the model's own tensor; a smaller one would be repeated there.

    Raises:
        CorruptedError: it is of another shape.
    """
    require_shape(tuple(came.shape), tuple(own.shape), name, folder)
    own.copy_(came)


def require_shape(
    came: tuple[int, ...], expected: tuple[int, ...], name: str, folder: Path
) -> None:
    """Refuse what came as `name` where it is of another shape than the model's own.

    Raises:
        CorruptedError: it is.
    """
    if came != expected:
        raise CorruptedError(
            f"{folder}: config.json expects {name} of shape {expected}, {came} came; write the "
            "checkpoint again"
        )
