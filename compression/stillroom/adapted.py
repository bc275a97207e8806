"""An adapter and its base side by side on disk: linked, or merged into one model."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from stillroom.checkpoint import files_below
from stillroom.contents import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def join_base(adapter: Path, base: Path) -> None:
    """Make the folder `adapter` name `base` by a relative path, wherever their parent is moved.

    Links to the base's files make a LoRA what transformers calls a complete model with an embedded
    adapter. Of other methods transformers knows nothing, and would load the base alone.
    """
    from stillroom.adapters.folder import set_base_reference
    from stillroom.adapters.peft_folder import PEFT_CONFIG

    relative = Path("..") / base.name
    set_base_reference(adapter, relative.as_posix())
    if not (adapter / PEFT_CONFIG).exists():
        return
    for path in files_below(base):
        link = adapter / path.relative_to(base)
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            up = Path(*[".."] * (len(link.relative_to(adapter).parts) - 1))
            link.symlink_to(up / relative / path.relative_to(base))


def merge_into(base: Path, adapter: Path, task: Task, folder: Path) -> None:
    """Write base and adapter into `folder` as one dense float32 model.

    Raises:
        SourceError: the base or the adapter cannot be loaded.
        MismatchError: the adapter is no LoRA, or belongs to another base.
    """
    from stillroom.adapters.folder import DEFAULT, load_adapter
    from stillroom.adapters.merge import merge_lora
    from stillroom.models import load_model, load_tokenizer, save_model

    model = load_model(base, task=task, weights="dense")
    merged = cast("PreTrainedModel", merge_lora(load_adapter(model, adapter), DEFAULT))
    # A model that was dequantized may not say of itself that it is quantized.
    if getattr(merged.config, "quantization_config", None) is not None:
        del merged.config.quantization_config
    save_model(merged, load_tokenizer(base), folder)
