"""Write a GPTQ checkpoint in another format, and compare what a fresh load of it computes."""

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from stillroom.data.examples import Examples
from stillroom.errors import SourceError
from stillroom.evaluation.figures import ReloadCheck
from stillroom.evaluation.reload import measure_reload
from stillroom.models import Task, load_model, load_pretrained, read_config

ExportFormat = Literal["gptq", "gptq_v2", "compressed-tensors"]


def export_folder(folder: Path, target: Path, export_format: ExportFormat) -> None:
    """Write the GPTQ checkpoint in `folder` to the new or empty folder `target`.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint, or `target` is not empty.
        MismatchError: the format cannot hold this checkpoint.
    """
    match export_format:
        case "gptq" | "gptq_v2":
            from stillroom.quantization.gptq_versions import convert_gptq

            convert_gptq(folder, target, export_format)
        case "compressed-tensors":
            from stillroom.quantization.compressed_tensors import export_compressed_tensors

            export_compressed_tensors(folder, target)


def measure_export(folder: Path, target: Path, *, rows: int = 2, length: int = 32) -> ReloadCheck:
    """Load both folders afresh in float32 and compare their logits on `rows` rows of random ids.

    `length` is in tokens. A compressed-tensors folder is read by transformers, any other by us.

    Raises:
        SourceError: one of them cannot be loaded.
    """
    config = read_config(folder)
    task = task_of(config.get("architectures"))
    examples = random_examples(int(config["vocab_size"]), rows, length)
    original = load_model(folder, task=task, dtype=torch.float32)
    return measure_reload(original, load_export(target, task), examples, rows=rows)


def load_export(target: Path, task: Task) -> PreTrainedModel:
    """Return the model of an exported folder in float32.

    Raises:
        SourceError: it cannot be loaded; for compressed-tensors, also where the package is absent.
    """
    section = read_config(target).get("quantization_config", {})
    if section.get("quant_method") != "compressed-tensors":
        return load_model(target, task=task, dtype=torch.float32)
    try:
        return load_pretrained(target, task=task, dtype=torch.float32)
    except ImportError as error:
        raise SourceError(
            f"{target} is written, but its logits could not be compared: transformers needs the "
            f"package compressed-tensors to load it; pip install compressed-tensors"
        ) from error


def task_of(architectures: list[str] | None) -> Task:
    """Return the task of a model by the class that its config.json names."""
    name = (architectures or [""])[0]
    return "sequence_classification" if name.endswith("Classification") else "causal_lm"


def random_examples(vocabulary: int, rows: int, length: int, seed: int = 0) -> Examples:
    """Return `rows` rows of `length` random token ids, without padding, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    return Examples(ids, torch.ones_like(ids), ids.clone(), torch.arange(rows), "random")
