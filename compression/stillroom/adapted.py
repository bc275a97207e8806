"""An adapter and its base side by side on disk: linked, or merged into one model."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from stillroom.checkpoint import files_below
from stillroom.contents import Task
from stillroom.intrinsic_dimension.folders import is_subspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def join_base(adapter: Path, base: Path) -> None:
    """Make the folder `adapter` name `base` by a relative path, wherever their parent is moved.

    Links to the base's files make a LoRA what transformers calls a complete model with an embedded
    adapter. Of other methods transformers knows nothing, and would load the base alone. A subspace
    is told where its base is when it is loaded.
    """
    from stillroom.adapters.folder import set_base_reference
    from stillroom.adapters.peft_folder import PEFT_CONFIG

    if is_subspace(adapter):
        return
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
        MismatchError: the adapter is no LoRA and no subspace, or belongs to another base.
    """
    import torch

    from stillroom.adapters.folder import DEFAULT, load_adapter
    from stillroom.adapters.merge import merge_lora
    from stillroom.intrinsic_dimension.artifact import load_with_base
    from stillroom.models import load_model, load_tokenizer, save_model

    if is_subspace(adapter):
        whole = load_with_base(adapter, base, task=task).merged()
    else:
        # Rounded to half precision, most of a small update would be lost.
        dense = load_model(base, task=task, dtype=torch.float32, weights="dense")
        whole = merge_lora(load_adapter(dense, adapter), DEFAULT)
    merged = cast("PreTrainedModel", whole)
    # A model that was dequantized may not say of itself that it is quantized.
    if getattr(merged.config, "quantization_config", None) is not None:
        del merged.config.quantization_config
    save_model(merged, load_tokenizer(base), folder)
