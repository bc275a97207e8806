"""Prove on a small random model what its dimensions count, by doubling every width."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.blocks import find_blocks
from stillroom.distillation.width_axes import Axes, Items, select
from stillroom.distillation.width_sizes import FIELD, Sizes, resized
from stillroom.errors import RecipeError


@torch.no_grad()
def holds(small: PreTrainedModel, axes: Axes, sizes: Sizes, ids: Tensor, expected: Tensor) -> bool:
    """Return whether having each item twice leaves the logits of the small model as they are."""
    blocks, found = find_blocks(small)
    generator = torch.Generator().manual_seed(1)

    def twice(total: int) -> Tensor:
        return torch.randperm(2 * total, generator=generator) % total

    items = Items(
        twice(sizes.hidden),
        tuple(twice(sizes.intermediate) for _ in found),
        tuple(twice(sizes.groups) for _ in found),
    )
    state = {}
    for name, tensor in small.state_dict().items():
        halved = tensor * 0.5 ** sum(axis is not None and axis.summed for axis in axes[name])
        state[name] = select(name, halved, axes, items, sizes, blocks)
    doubled = replace(
        sizes,
        hidden=2 * sizes.hidden,
        intermediate=2 * sizes.intermediate,
        heads=2 * sizes.heads,
        groups=2 * sizes.groups,
    )
    came = run(filled(type(small), resized(small.config, doubled), state), ids)
    # Rounding changes them by some 1e-6 of their size, a wrong order by a tenth or more.
    tolerance = 1e-4 * expected.abs().mean()
    return came is not None and bool((came - expected).abs().max() <= tolerance)


def run(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Return a model's first output, or None where the shapes inside do not fit together."""
    try:
        output = model(input_ids=ids)
    except RuntimeError:
        return None
    first: Tensor = output[0]
    return first


@torch.enable_grad()
def check_used(model: PreTrainedModel, output: Tensor, blocks: str) -> None:
    """Refuse blocks with parameters that the logits do not depend on: nothing can be proved."""
    torch.autograd.backward(output.sum())
    for name, parameter in model.named_parameters():
        if name.startswith(f"{blocks}.") and parameter.grad is None:
            raise RecipeError(
                f"{FIELD}: blocks expected all of whose parameters are used, and {name} of a "
                f"{type(model).__name__} is not; take another teacher"
            )


def empty(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a float32 model whose parameters have shapes and no numbers.

    Raises:
        RecipeError: models of this kind do not allow these sizes.
    """
    from accelerate import init_empty_weights

    # Buffers are computed, as nothing else gives their values.
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind._from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32
            )
    except ValueError as error:
        raise RecipeError(
            f"{FIELD}: sizes expected that a {kind.__name__} allows, also in the small one by "
            f"which its widths are found; {error} came; take another teacher, or a student of "
            "fewer layers"
        ) from error
    return model


def shapes(kind: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's saved tensors by name."""
    state = empty(kind, config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def random_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return numbers for an empty model: matrices around 0, vectors around 1, buffers as made."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {}
    for name, value in model.state_dict().items():
        if name not in parameters:
            state[name] = value
        elif value.dim() < 2:
            # Norm weights near 0 would hide what comes before them.
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            scale = float(value.shape[-1] ** -0.5)
            state[name] = torch.randn(value.shape, generator=generator) * scale
    return state


def filled(
    kind: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor]
) -> PreTrainedModel:
    """Return a model with these tensors, none of which are tied, in evaluation mode."""
    model = empty(kind, config)
    model.load_state_dict(state, assign=True)
    model.train(False)
    return model
