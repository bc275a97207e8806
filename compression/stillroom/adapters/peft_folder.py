"""LoRA in peft's own files: the names of its tensors, and its config.

peft calls A of a layer `base_model.model.<layer>.lora_A.weight`, and a classifier's head, which it
trains and saves beside, `base_model.model.<head>.…`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stillroom.adapters.options import LoraOptions
from stillroom.contents import Task
from stillroom.errors import MismatchError, SourceError

if TYPE_CHECKING:
    from stillroom.adapters.adapted_model import AdaptedModel, Worn

PEFT_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
TASKS: dict[Task, str] = {
    "causal_lm": "CAUSAL_LM",
    # peft has no type for masked models: this one passes the model's own outputs on.
    "masked_lm": "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
}
# What peft's config may say that changes what is computed, and what it says where it does not.
USUAL = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "fan_in_fan_out": None,  # ours to find out
    "lora_bias": False,
    "trainable_token_indices": None,
    "exclude_modules": [],
    "target_parameters": [],
    "layer_replication": [],
    "alora_invocation_tokens": [],
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
# How A and B began where the base stayed as it was. Others take from the base what they put into
# A and B: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA.
BESIDE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def to_peft_names(worn: "Worn") -> dict[str, Tensor]:
    """Return the tensors of a LoRA, and of its head, by the names that peft gives them."""
    named = {}
    for key, value in worn.method.tensors().items():
        _, layer, matrix = key.split(".")  # updates.<layer, its dots slashes>.A
        named[f"{PREFIX}{layer.replace('/', '.')}.lora_{matrix}.weight"] = value
    if worn.head is not None:
        for key, value in worn.head.tensors().items():
            named[PREFIX + key.removeprefix("copies.")] = value
    return named


def from_peft_names(tensors: dict[str, Tensor], worn: "Worn", folder: Path) -> dict[str, Tensor]:
    """Return tensors that peft named by the names that ours have.

    Raises:
        SourceError: there are others than a LoRA of these layers has.
    """
    ours = [f"method.{key}" for key in worn.method.tensors()]
    ours += [f"head.{key}" for key in (worn.head.tensors() if worn.head else ())]
    known = dict(zip(to_peft_names(worn), ours, strict=True))
    if odd := sorted(set(known) ^ set(tensors)):
        raise SourceError(
            f"the adapter in {folder} does not fit the model: {', '.join(odd[:3])} is in one of "
            "the two alone; load the base it was trained on"
        )
    return {known[name]: value for name, value in tensors.items()}


def write_peft_config(
    worn: "Worn", model: "AdaptedModel", folder: Path, base_reference: str
) -> None:
    """Write what makes the folder one that peft loads."""
    from peft import LoraConfig, TaskType

    from stillroom.adapters.lora import LoraAdapter, is_transposed, shortest_endings

    assert isinstance(worn.method, LoraAdapter)
    assert isinstance(worn.options, LoraOptions)
    targets = shortest_endings(model.base, worn.method.targets)
    config = LoraConfig(
        task_type=TaskType[TASKS[worn.task]],
        r=worn.options.rank,
        lora_alpha=worn.options.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=worn.options.dropout,
        target_modules=targets,
        fan_in_fan_out=is_transposed(model.base, worn.method.targets),
        modules_to_save=None if worn.head is None else sorted(worn.head.copies),
        base_model_name_or_path=base_reference,
        inference_mode=True,
    )
    # peft keeps names in sets, whose order changes from process to process.
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    ordered = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    (folder / PEFT_CONFIG).write_text(json.dumps(ordered, indent=2, sort_keys=True))


def options_of_peft(folder: Path) -> LoraOptions:
    """Return what a folder that peft wrote says of its LoRA.

    Raises:
        SourceError: there is no config, or it is of no LoRA.
        MismatchError: it asks for what ours does not compute, or its base was changed, too.
    """
    config = _read(folder)
    if config.get("peft_type") != "LORA":
        raise SourceError(
            f"{folder} holds an adapter of peft's type {config.get('peft_type')}: LORA was "
            "expected; load it with peft"
        )
    for name, usual in USUAL.items():
        value = config.get(name, usual)
        if name != "fan_in_fan_out" and value not in (usual, None):
            raise MismatchError(
                f"{folder}: {name} {value} of peft is not computed here; load it with peft"
            )
    _require_unchanged_base(config, folder)
    targets = config["target_modules"]
    return LoraOptions(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        target_modules=None if isinstance(targets, str) else tuple(targets),
    )


def _require_unchanged_base(config: dict[str, Any], folder: Path) -> None:
    begun = config.get("init_lora_weights")
    if (begun.lower() if isinstance(begun, str) else begun) not in BESIDE_THE_BASE:
        raise MismatchError(
            f"{folder}: init_lora_weights {begun} of peft changes the base, too, and an adapter "
            "was expected that says alone what it computes; load it with peft, or have peft save "
            "it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def task_of_peft(folder: Path) -> Task:
    """Return the task of an adapter that peft wrote."""
    name = _read(folder).get("task_type")
    return next((task for task, peft in TASKS.items() if peft == name), "causal_lm")


def _read(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text())
    except FileNotFoundError:
        raise SourceError(f"{folder} holds no adapter: {PEFT_CONFIG} is missing") from None
    return content
