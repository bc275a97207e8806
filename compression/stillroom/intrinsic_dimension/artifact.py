"""A trained subspace on disk: d floats, and what names the base that they belong to."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillroom.errors import CorruptedError, MismatchError, RecipeError, SourceError
from stillroom.intrinsic_dimension.folders import CONFIG, METHOD
from stillroom.intrinsic_dimension.subspace import SubspaceModel, SubspaceOptions
from stillroom.models import Task, load_pretrained, read_config
from stillroom.training.options import derived_seed

WEIGHTS = "adapter_model.safetensors"


def save_subspace(
    model: SubspaceModel,
    folder: Path,
    base_reference: str,
    *,
    label_names: tuple[str, ...] = (),
    head_seed: int | None = None,
) -> None:
    """Write the d numbers of `model` below `folder`, and which base they belong to.

    `base_reference` says where the base is; `label_names` and `head_seed` are what `load_base` made
    its new head of, where it has one. The same subspace gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vector = model.vector.detach().float().cpu().contiguous()
    save_file({"vector": vector}, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "method": METHOD,
        **asdict(model.options),
        "parameters": model.size,
        "base_model_name_or_path": base_reference,
        "base_model_type": type(model.base).__name__,
        "base_shapes_sha256": shapes_sha256(model),
        "base_values_sha256": values_sha256(model),
        "label_names": list(label_names),
        "head_seed": head_seed,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def load_subspace(
    base: nn.Module, folder: Path, *, base_reference: str | None = None
) -> SubspaceModel:
    """Return `base`, frozen, in the trained subspace that `folder` holds, in evaluation mode.

    `base_reference`, where it is given, must be the one that was saved.

    Raises:
        SourceError: the folder holds no trained subspace.
        MismatchError: it was trained on another base, on parameters of another shape, or on
            another revision of the base; the message says which.
        CorruptedError: its file does not hold d numbers.
    """
    config = read_subspace_config(folder)
    _require_base(config, base, base_reference)
    options = SubspaceOptions(
        dimension=config["dimension"],
        projection=config["projection"],
        structure_aware=config["structure_aware"],
        seed=config["seed"],
    )
    trainable = {name: v.shape for name, v in base.named_parameters() if v.requires_grad}
    if _sha256_of_shapes(trainable) != config["base_shapes_sha256"]:
        size = sum(shape.numel() for shape in trainable.values())
        raise MismatchError(
            f"the subspace in {folder} was trained on a base of another shape: "
            f"{config['parameters']} trainable parameters under other names or in other shapes, "
            f"{size} came; load the base with the same layers, words and labels"
        )
    model = SubspaceModel(base, options)
    if values_sha256(model) != config["base_values_sha256"]:
        raise MismatchError(
            f"the subspace in {folder} was trained on another revision of its base: names and "
            "shapes of the parameters agree, their values do not; load the revision that it was "
            f"trained on ({config['base_model_name_or_path']})"
        )
    _set_vector(model, folder)
    return model.eval()


def load_base(
    folder: Path, *, task: Task, label_names: tuple[str, ...] = (), head_seed: int = 0
) -> Any:
    """Return the dense model in `folder`, in float32; a head that it lacks is drawn from the seed.

    Raises:
        RecipeError: the model is quantized.
        SourceError: the folder holds no model.
    """
    if "quantization_config" in read_config(folder):
        raise RecipeError(
            f"{folder} is quantized: expected a dense base, whose numbers can be moved; measure "
            "the dense model that it was made of"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(head_seed, "head"))
        return load_pretrained(folder, task=task, label_names=label_names)


def load_with_base(folder: Path, base_folder: Path, *, task: Task) -> SubspaceModel:
    """Return the base in `base_folder`, with the head it was given, in the subspace of `folder`.

    Raises:
        what `load_base` and `load_subspace` raise.
    """
    config = read_subspace_config(folder)
    base = load_base(
        base_folder,
        task=task,
        label_names=tuple(config["label_names"]),
        head_seed=config["head_seed"] or 0,
    )
    return load_subspace(base, folder)


def read_subspace_config(folder: Path) -> dict[str, Any]:
    """Return what `save_subspace` wrote of a trained subspace.

    Raises:
        SourceError: the folder holds none.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} holds no trained subspace: {CONFIG}: {error}") from error
    if config.get("method") != METHOD:
        raise SourceError(
            f"{folder} holds no trained subspace: expected method {METHOD!r} in its {CONFIG}, "
            f"{config.get('method') or config.get('peft_type')!r} came"
        )
    return config


def shapes_sha256(model: SubspaceModel) -> str:
    """Return a SHA-256 over the names and shapes of the parameters that θ is made of."""
    return _sha256_of_shapes(model.shapes)


def values_sha256(model: SubspaceModel) -> str:
    """Return a SHA-256 over the values of the parameters that θ starts from, in their order."""
    digest = hashlib.sha256()
    for name in model.shapes:
        value = model.base.get_parameter(name).detach().cpu().contiguous()
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256_of_shapes(shapes: dict[str, torch.Size]) -> str:
    listed = [[name, list(shape)] for name, shape in shapes.items()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _require_base(config: dict[str, Any], base: nn.Module, reference: str | None) -> None:
    trained_on = config["base_model_name_or_path"]
    if reference is not None and reference != trained_on:
        raise MismatchError(
            f"the subspace was trained on another base: {trained_on} expected, {reference} came; "
            "load that one, or train a subspace for this one"
        )
    kind = type(base).__name__
    if kind != config["base_model_type"]:
        raise MismatchError(
            f"the subspace was trained on another base: a {config['base_model_type']} "
            f"({trained_on}) expected, a {kind} came; load that one"
        )


def _set_vector(model: SubspaceModel, folder: Path) -> None:
    try:
        vector = load_file(folder / WEIGHTS)["vector"]
    except (OSError, KeyError) as error:
        raise SourceError(f"{folder} holds no trained subspace: {WEIGHTS}: {error}") from error
    if vector.shape != model.vector.shape:
        raise CorruptedError(
            f"{folder / WEIGHTS} holds {tuple(vector.shape)} numbers, its config says "
            f"{model.options.dimension}; fetch it again"
        )
    with torch.no_grad():
        model.vector.copy_(vector)
