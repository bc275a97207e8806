"""Build a model of another shape out of a teacher's numbers, without ever initialising it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.errors import MismatchError

Model = TypeVar("Model", bound=PreTrainedModel)


@torch.no_grad()
def construct(
    kind: type[Model],
    config: PreTrainedConfig,
    values: Callable[[str], Tensor],
    like: PreTrainedModel,
) -> Model:
    """Return a model of class `kind` whose tensor of each name is a copy of `values(name)`.

    It shares no memory with `like`, from which it takes the number format, the device, the mode
    and the settings of generation. No parameter is made before its value is there, so no memory is
    used twice and no random number is drawn.

    Raises:
        MismatchError: a value has another shape than the model's tensor of that name.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: Model = kind._from_config(config, dtype=like.dtype)  # type: ignore[no-untyped-call]
    saved = set(model.state_dict())
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _fitting(f"{prefix}.{name}".lstrip("."), values, parameter)
            setattr(module, name, nn.Parameter(value.to(like.device, value.dtype, copy=True)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            full_name = f"{prefix}.{name}".lstrip(".")
            value = _fitting(full_name, values, buffer) if full_name in saved else buffer
            setattr(module, name, value.to(like.device, copy=True))
    model.tie_weights()
    generation = getattr(like, "generation_config", None)  # a classifier has none
    if generation is not None:
        model.generation_config = type(generation).from_dict(generation.to_dict())
    model.train(like.training)
    return model


def _fitting(name: str, values: Callable[[str], Tensor], place: Tensor) -> Tensor:
    value = values(name).detach()
    if value.shape != place.shape:
        raise MismatchError(
            f"{name}: {tuple(place.shape)} expected by the config, {tuple(value.shape)} made of "
            "the teacher; its config does not describe its weights"
        )
    return value
