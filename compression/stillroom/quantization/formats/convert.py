"""Write a GPTQ checkpoint in another format, and compare what a fresh load of it computes."""

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from stillroom.data.examples import Examples
from stillroom.errors import MismatchError, SourceError
from stillroom.evaluation.figures import ReloadCheck
from stillroom.evaluation.quality import predict
from stillroom.evaluation.reload import measure_reload
from stillroom.folder import WHOLE, filling
from stillroom.llama_engine import GGUF_FILE
from stillroom.models import Task, load_model, load_pretrained, read_config

ExportFormat = Literal["gptq", "gptq_v2", "auto-gptq", "compressed-tensors", "gguf"]
# What these formats hold is what was there, so their logits differ by the order of sums at most.
LARGEST_DIFFERENCE = 1e-3  # of the largest logit


def export_folder(folder: Path, target: Path, export_format: ExportFormat) -> Path:
    """Write the GPTQ checkpoint in `folder` to the new or empty folder `target`; return the result.

    A GGUF is one file: `target` itself where it ends in .gguf, else model.gguf in it.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint.
        StoreError: `target` is not empty, or cannot be written.
        MismatchError: the format cannot hold this checkpoint.
    """
    match export_format:
        case "gptq" | "gptq_v2":
            from stillroom.quantization.formats.gptq_versions import convert_gptq

            convert_gptq(folder, target, export_format)
        case "auto-gptq":
            from stillroom.quantization.formats.auto_gptq import export_auto_gptq

            export_auto_gptq(folder, target)
        case "compressed-tensors":
            from stillroom.quantization.formats.compressed_tensors import export_compressed_tensors

            export_compressed_tensors(folder, target)
        case "gguf":
            from stillroom.quantization.formats.gguf_export import export_gguf

            if target.suffix == ".gguf":
                export_gguf(folder, target)
                return target
            with filling(target) as scratch:
                (scratch / WHOLE).mkdir()
                export_gguf(folder, scratch / WHOLE / GGUF_FILE)
            return target / GGUF_FILE
    return target


def check_export(folder: Path, written: Path) -> ReloadCheck:
    """Return how far the logits of an export are from those of `folder`, as `measure_export` does.

    Raises:
        SourceError: one of them cannot be loaded.
        MismatchError: a format that holds the same numbers gives other logits.
    """
    check = measure_export(folder, written)
    if written.suffix != ".gguf" and not check.relative <= LARGEST_DIFFERENCE:
        raise MismatchError(
            f"{written} does not compute what {folder} computes: its logits differ by "
            f"{check.relative:.1e} of the largest, expected {LARGEST_DIFFERENCE:.0e} or less; "
            f"do not use it, and report this"
        )
    return check


def measure_export(folder: Path, written: Path, *, rows: int = 2, length: int = 32) -> ReloadCheck:
    """Load both afresh and compare their logits, in float32, on `rows` rows of random ids.

    `length` is in tokens. A GGUF runs under llama.cpp, transformers loads compressed-tensors, and
    any other folder is read by us. Both models are in memory at the same time.

    Raises:
        SourceError: one of them cannot be loaded.
    """
    config = read_config(folder)
    task = task_of(config.get("architectures"))
    examples = random_examples(int(config["vocab_size"]), rows, length)
    original = load_model(folder, task=task, dtype=torch.float32)
    if written.suffix == ".gguf":
        return _compare_gguf(original, written, examples)
    return measure_reload(original, load_export(written, task), examples, rows=rows)


def _compare_gguf(original: PreTrainedModel, file: Path, examples: Examples) -> ReloadCheck:
    from stillroom.llama_engine import LlamaCppModel

    engine = LlamaCppModel(file)
    expected = predict(original, examples).float()  # (rows, length, vocab)
    came = torch.stack(
        [torch.from_numpy(engine.logits(row)) for row in examples.input_ids.tolist()]
    )
    return ReloadCheck(float((came - expected).abs().max()), float(expected.abs().max()))


def load_export(target: Path, task: Task) -> PreTrainedModel:
    """Return the model of an exported folder in float32.

    Raises:
        SourceError: it cannot be loaded; for compressed-tensors, also where the package is absent.
    """
    section = read_config(target).get("quantization_config", {})
    if section.get("quant_method") != "compressed-tensors":
        return load_model(target, task=task, dtype=torch.float32)
    try:
        return load_pretrained(target, task=task, dtype=torch.float32, new_head=False)
    except ImportError as error:
        raise SourceError(
            f"{target}: transformers needs the package compressed-tensors to load it; "
            f"pip install 'compressed-tensors<0.18'"
        ) from error


def task_of(architectures: list[str] | None) -> Task:
    """Return the task of a model by the class that its config.json names."""
    name = (architectures or [""])[0]
    if name.endswith("ForMaskedLM"):
        return "masked_lm"
    return "sequence_classification" if name.endswith("Classification") else "causal_lm"


def random_examples(vocabulary: int, rows: int, length: int, seed: int = 0) -> Examples:
    """Return `rows` rows of `length` random token ids, without padding, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    return Examples(ids, torch.ones_like(ids), ids.clone(), torch.arange(rows), "random")
