"""An adapter and its base side by side on disk: linked, or merged into one model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stillroom.checkpoint import files_below
from stillroom.contents import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def join_base(adapter: Path, base: Path) -> None:
    """Make the folder `adapter` load together with `base`, wherever their parent is moved.

    Its config comes to name the base by a relative path; links to the base's files make it what
    transformers calls a complete model with an embedded adapter.
    """
    relative = Path("..") / base.name
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = relative.as_posix()
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
    for path in files_below(base):
        link = adapter / path.relative_to(base)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            up = Path(*[".."] * (len(link.relative_to(adapter).parts) - 1))
            link.symlink_to(up / relative / path.relative_to(base))


def merge_subspace_into(base: Path, adapter: Path, task: Task, folder: Path) -> None:
    """Write base and trained subspace into `folder` as one dense float32 model.

    Raises:
        SourceError: the base or the subspace cannot be loaded.
        MismatchError: the subspace was trained on another base.
    """
    from stillroom.intrinsic_dimension.artifact import load_with_base
    from stillroom.models import load_tokenizer, save_model

    merged = cast("PreTrainedModel", load_with_base(adapter, base, task=task).merged())
    save_model(merged, load_tokenizer(base), folder)


def merge_into(base: Path, adapter: Path, task: Task, folder: Path) -> None:
    """Write base and adapter into `folder` as one dense float32 model.

    Raises:
        SourceError: the base or the adapter cannot be loaded.
    """
    from stillroom.adapters.lora import load_adapter
    from stillroom.adapters.merge import merge_lora
    from stillroom.models import load_model, load_tokenizer, save_model

    model = load_model(base, task=task, weights="dense")
    merged = cast("PreTrainedModel", merge_lora(load_adapter(model, adapter)))
    # A model that was dequantized may not say of itself that it is quantized.
    if getattr(merged.config, "quantization_config", None) is not None:
        del merged.config.quantization_config
    save_model(merged, load_tokenizer(base), folder)
