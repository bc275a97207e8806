"""Low-rank adapters (LoRA, 2106.09685): train, save and load them, through peft."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from stillroom.blocks import find_blocks, find_linears
from stillroom.checkpoint import Checkpoints
from stillroom.contents import Task
from stillroom.data.examples import Examples
from stillroom.errors import RecipeError, SourceError
from stillroom.fine_tuning import fine_tune
from stillroom.progress import Progress, silent
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.history import TrainingHistory
from stillroom.training.options import TrainingOptions, derived_seed

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraOptions:
    """Shape of the update B A · alpha / rank, and beside which layers it stands.

    `target_modules` are the last parts of their names; None is every linear in the blocks.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None


def train_lora(
    model: nn.Module,
    examples: Examples,
    options: LoraOptions,
    training: TrainingOptions,
    *,
    evaluation: Examples | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> tuple["PeftModel", TrainingHistory]:
    """Put LoRA into `model`, in place, and train it by cross-entropy; the base stays frozen.

    A classifier's head is trained with it and saved with the adapter; the head that names a masked
    model's words stays as it is.

    Raises:
        RecipeError: a target module is not in the model.
        what `stillroom.training.loop.train` raises.
    """
    task: Task = "masked_lm" if examples.masked else "causal_lm"
    if examples.label_names:
        task = "sequence_classification"
    adapted = add_lora(model, options, task=task, seed=training.seed)
    history = fine_tune(
        adapted,
        examples,
        training,
        evaluation=evaluation,
        checkpoints=checkpoints,
        fingerprint=f"{fingerprint} {options}",
        progress=progress,
    )
    return adapted, history


def add_lora(
    model: nn.Module, options: LoraOptions, *, task: Task = "causal_lm", seed: int = 0
) -> "PeftModel":
    """Return `model`, changed in place, with fresh LoRA layers: its outputs stay the same.

    A is drawn from `seed`, B is zero. The base is frozen.

    Raises:
        RecipeError: a target module is not in the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from stillroom.adapters.quantized_lora import register

    types = {
        "causal_lm": TaskType.CAUSAL_LM,
        # peft has no type for masked models: this one passes the model's own outputs on.
        "masked_lm": TaskType.FEATURE_EXTRACTION,
        "sequence_classification": TaskType.SEQ_CLS,
    }
    targets = target_names(model, options.target_modules)
    config = LoraConfig(
        task_type=types[task],
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=options.dropout,
        target_modules=targets,
        fan_in_fan_out=_is_transposed(model, targets),
    )
    register(config)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(derived_seed(seed, "lora"))
        return get_peft_model(model, config)


def target_names(model: nn.Module, wanted: tuple[str, ...] | None) -> list[str]:
    """Return the endings of the names of the layers to adapt, sorted.

    None: every linear in the blocks, by the name inside its block, or by the full name where a
    layer outside the blocks ends in the same way.

    Raises:
        RecipeError: a wanted ending fits no linear layer in the blocks.
    """
    prefix, blocks = _blocks(model)
    inside = {
        f"{prefix}.{i}.{name}": name for i, block in enumerate(blocks) for name in _linears(block)
    }
    if wanted is not None:
        missing = [name for name in wanted if not any(_ends(full, name) for full in inside)]
        if missing:
            raise RecipeError(
                f"adapter.target_modules: {', '.join(missing)} is not in the model; "
                f"choose from {', '.join(sorted(set(inside.values())))}"
            )
        return sorted(wanted)
    endings = set(inside.values())
    for full, _ in model.named_modules():
        if full not in inside and any(_ends(full, ending) for ending in endings):
            return sorted(inside)
    return sorted(endings)


def save_adapter(adapted: "PeftModel", folder: Path, base_reference: str) -> None:
    """Write the adapter as peft reads it; `base_reference` says which base it belongs to.

    The same adapter gives the same bytes.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would ask the hub how many words the base had.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_reference, "inference_mode": True}
    # peft keeps names in sets, whose order changes from process to process.
    ordered = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / CONFIG).write_text(json.dumps(ordered, indent=2, sort_keys=True))


def load_adapter(model: nn.Module, folder: Path) -> "PeftModel":
    """Return `model`, changed in place, with the adapter in `folder`, in evaluation mode.

    Raises:
        SourceError: the folder holds no adapter, or one for another base.
    """
    from peft import LoraConfig, PeftModel

    from stillroom.adapters.quantized_lora import register

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SourceError(f"{folder} holds no adapter: {name} is missing")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        register(config)
        with _quiet():
            adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), config=config)
    except (ValueError, RuntimeError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise SourceError(f"the adapter in {folder} does not fit the model: {line}") from error
    return adapted.eval()


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer of `model` is kept quantized."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    # Quantized layers hold no parameters, by which the blocks of a dense model are found.
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and is_quantized(module):
            return name, module
    return find_blocks(model)


def _linears(block: nn.Module) -> list[str]:
    packed = [name for name, child in block.named_modules() if isinstance(child, QuantizedLinear)]
    return [*find_linears(block), *packed]


def _ends(full: str, ending: str) -> bool:
    return full == ending or full.endswith(f".{ending}")


def _is_transposed(model: nn.Module, targets: list[str]) -> bool:
    # GPT-2's Conv1D keeps its weight as (in, out); peft has to be told.
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) and any(_ends(name, target) for target in targets)
        for name, module in model.named_modules()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft reads what transformers deprecates, and advises those who call it themselves.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        yield
