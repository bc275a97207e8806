"""An adapter on disk: what it belongs to, and its few tensors.

A folder of two files, or three:

  stillroom_adapter.json     format 1; `method` and `options` (stillroom.adapters.options), `task`,
                             `base`: reference, architecture, shape, dtype and probe
                             (stillroom.adapters.base_identity)
  adapter_model.safetensors  float32 tensors by name: those of the method, `method.…`, and those of
                             a classifier's head of its own, `head.…`
  adapter_config.json        LoRA alone: peft's own config. The tensors then bear peft's names
                             (stillroom.adapters.peft_folder), and peft and transformers load the
                             folder as one of theirs; without a stillroom_adapter.json it is one
                             that peft wrote, and is read as such

The same adapter gives the same bytes.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.adapters.adapted_model import AdaptedModel, Worn
from stillroom.adapters.base_identity import BaseIdentity, require_same_base
from stillroom.adapters.options import AdapterOptions, as_fields, make_options, method_of
from stillroom.adapters.peft_folder import (
    PEFT_CONFIG,
    from_peft_names,
    options_of_peft,
    task_of_peft,
    to_peft_names,
    write_peft_config,
)
from stillroom.contents import Task
from stillroom.errors import MismatchError, SourceError

DESCRIPTION = "stillroom_adapter.json"
WEIGHTS = "adapter_model.safetensors"
FORMAT = 1
DEFAULT = "default"


def save_adapter(model: AdaptedModel, name: str, folder: Path, base_reference: str) -> None:
    """Write the adapter `name` into `folder`; `base_reference` says which base it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    worn = model.worn(name)
    method = method_of(worn.options)
    tensors = _named(worn)
    if method == "lora":
        write_peft_config(worn, model, folder, base_reference)
        tensors = to_peft_names(worn)
    save_file(
        {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    description = {
        "format": FORMAT,
        "method": method,
        "options": as_fields(worn.options),
        "task": worn.task,
        "base": {"reference": base_reference, **asdict(model.identity)},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True))


def load_into(model: AdaptedModel, name: str, folder: Path) -> None:
    """Put the adapter in `folder` on the model as `name`, and wear it.

    Where that fails, the model is as it was before.

    Raises:
        SourceError: the folder holds no adapter, or its tensors are not what it says.
        MismatchError: it belongs to another base, another revision or another shape.
    """
    options, task, trained_on = _describe(folder)
    if trained_on is not None:
        require_same_base(trained_on, model.identity, f"the adapter in {folder}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{folder / WEIGHTS} cannot be read: {error}; fetch it again") from error
    before = model.selected
    model.add(name, options, task=task)
    worn = model.worn(name)
    try:
        if method_of(options) == "lora":
            tensors = from_peft_names(tensors, worn, folder)
        for part_name, part in worn.parts.items():
            prefix = f"{part_name}."
            part.take(
                {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
            )
    except BaseException:
        model.remove(name)
        model.select(before)
        raise


def load_adapter(base: Any, folder: Path) -> AdaptedModel:
    """Return `base` wearing the adapter in `folder`, in evaluation mode.

    Raises:
        SourceError: the folder holds no adapter.
        MismatchError: it belongs to another base.
    """
    adapted = AdaptedModel(base)
    load_into(adapted, DEFAULT, folder)
    return adapted.eval()


def set_base_reference(folder: Path, reference: str) -> None:
    """Have the adapter in `folder` say that its base is at `reference`."""
    for file, keys in ((DESCRIPTION, ("base", "reference")), (PEFT_CONFIG, ())):
        path = folder / file
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        if keys:
            content["base"]["reference"] = reference
        else:
            content["base_model_name_or_path"] = reference
        path.write_text(json.dumps(content, indent=1 if keys else 2, sort_keys=True))


def _named(worn: Worn) -> dict[str, Tensor]:
    return {
        f"{part_name}.{key}": value
        for part_name, part in worn.parts.items()
        for key, value in part.tensors().items()
    }


def _describe(folder: Path) -> tuple[AdapterOptions, Task, BaseIdentity | None]:
    if not (folder / WEIGHTS).is_file():
        raise SourceError(f"{folder} holds no adapter: {WEIGHTS} is missing")
    if not (folder / DESCRIPTION).is_file():
        return options_of_peft(folder), task_of_peft(folder), None
    try:
        content = json.loads((folder / DESCRIPTION).read_text())
        if content["format"] > FORMAT:
            raise MismatchError(
                f"{folder} has format {content['format']} of an adapter, at most {FORMAT} was "
                "expected: read it with a newer stillroom"
            )
        base = content["base"]
        identity = BaseIdentity(
            base["architecture"], base["shape"], base["dtype"], tuple(base["probe"])
        )
        return make_options(content["method"], content["options"]), content["task"], identity
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder / DESCRIPTION} does not describe an adapter ({error}); fetch it again"
        ) from error
