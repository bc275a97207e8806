"""Make a student out of some of the teacher's layers."""

import copy
from typing import Literal, TypeVar, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.blocks import find_blocks
from stillroom.errors import RecipeError
from stillroom.streamed import OnDisk

Rule = Literal["every_other", "first_last", "even"]
Model = TypeVar("Model", bound=PreTrainedModel)


def choose_layers(total: int, count: int, rule: Rule = "even") -> tuple[int, ...]:
    """Return which `count` of `total` layers a student takes, counted from 0, ascending.

    "even": spread evenly from the first to the last, both included; 6 of 12 are 0, 2, 4, 7, 9, 11,
    as DistilBERT takes them. "every_other": steps of total / count from the first on; 6 of 12 are
    0, 2, 4, 6, 8, 10. "first_last": the first half from the start, the rest from the end.

    Raises:
        RecipeError: the teacher has fewer layers, or none is asked for.
    """
    if not 1 <= count <= total:
        raise RecipeError(
            f"student.layers: expected 1 to {total} layers, as many as the teacher has, got {count}"
        )
    match rule:
        case "even":
            steps = max(count - 1, 1)
            # Halves are rounded up in integers: float rounding would go to the even neighbour.
            return tuple((2 * i * (total - 1) + steps) // (2 * steps) for i in range(count))
        case "every_other":
            return tuple(i * total // count for i in range(count))
        case "first_last":
            first = (count + 1) // 2
            return (*range(first), *range(total - (count - first), total))


def initialise_student(teacher: Model, layers: tuple[int, ...]) -> Model:
    """Return a new model that has copies of the teacher's blocks `layers`, and of all the rest.

    The copy shares no memory with the teacher. Its config says the new number of layers, also in
    lists with one entry a layer, so the student saves and loads as any model of its kind. What a
    kind computes from a layer's number, such as DiffLlama's lambda_init, follows the new number.

    Raises:
        RecipeError: a layer is out of range or named twice, or the order is not ascending; or no
            config of the teacher's kind says which layers are left.
    """
    name, blocks = find_blocks(teacher)
    _check_layers(layers, len(blocks))
    # What the memo already holds is not copied: the layers left out cost no memory.
    memo: dict[int, object] = {
        id(block): nn.Identity() for i, block in enumerate(blocks) if i not in layers
    }
    student = copy.deepcopy(teacher, memo)
    # The copy's list holds two kinds of modules, and would not be found again.
    copied = cast(nn.ModuleList, memo[id(blocks)])
    _keep(student, name, copied, layers)
    return student


def load_student(model: Model, blocks: OnDisk, layers: tuple[int, ...]) -> Model:
    """Return a teacher that was opened with `open_streamed` as a student of its blocks `layers`.

    The model changes in place, and the other blocks are never read: memory depends on the student's
    size, not on the teacher's. Otherwise as `initialise_student`.

    Raises:
        what `initialise_student` raises.
    """
    name, all_blocks = find_blocks(model)
    _check_layers(layers, len(all_blocks))
    for layer in layers:
        blocks.load(f"{name}.{layer}")
    _keep(model, name, all_blocks, layers)
    return model


def _keep(
    model: PreTrainedModel, name: str, blocks: nn.ModuleList, layers: tuple[int, ...]
) -> None:
    """Cut a model's list of blocks, which it calls `name`, down to `layers`, in place."""
    total, kept = len(blocks), [blocks[layer] for layer in layers]
    del blocks[:]
    blocks.extend(kept)
    _shrink_config(model.config, layers, total)
    loaded = _as_loaded(model)
    _check_shapes(model, loaded, layers)
    _renumber(blocks, cast(nn.ModuleList, loaded.get_submodule(name)))
    model.requires_grad_(True)


def _check_layers(layers: tuple[int, ...], total: int) -> None:
    if not layers or list(layers) != sorted(set(layers)):
        raise RecipeError(
            f"student.layers: expected different layers in ascending order, got {list(layers)}"
        )
    if layers[0] < 0 or layers[-1] >= total:
        raise RecipeError(
            f"student.layers: the teacher's layers are 0 to {total - 1}, got {list(layers)}"
        )


def _as_loaded(model: Model) -> Model:
    """Return the model that the config alone makes, without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return type(model)(copy.deepcopy(model.config))


def _check_shapes(model: PreTrainedModel, loaded: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Refuse a student that would not load as what it is: hours of training would be lost."""
    shapes, expected = (
        {name: value.shape for name, value in each.state_dict().items()} for each in (model, loaded)
    )
    if shapes != expected:
        differing = sorted(
            name for name in shapes | expected if shapes.get(name) != expected.get(name)
        )
        raise RecipeError(
            f"student.layers: a {type(model).__name__} with the layers {list(layers)} alone would "
            f"load as another model, because its config cannot say that ({differing[0]} differs): "
            "take layers whose kinds alternate as the teacher's do, or a teacher of one stack"
        )


def _renumber(blocks: nn.ModuleList, loaded: nn.ModuleList) -> None:
    """Give the blocks' modules the numbers that those of a loaded model have."""
    # Attention finds its part of the key-value cache by a layer's number, under a name that differs
    # by kind, and some scale what they compute by it: GPT-2 by its inverse where it is told to.
    for module, fresh in zip(blocks.modules(), loaded.modules(), strict=True):
        for name, value in vars(fresh).items():
            if isinstance(value, int | float) and name != "training":
                setattr(module, name, value)


def _shrink_config(config: PreTrainedConfig, layers: tuple[int, ...], total: int) -> None:
    # The setter maps this name to the config's own, such as GPT-2's n_layer.
    config.num_hidden_layers = len(layers)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == total:
            setattr(config, name, type(value)(value[layer] for layer in layers))
