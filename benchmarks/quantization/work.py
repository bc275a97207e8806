"""The fixed work: the model, its shorter and longer versions, and the rows of text."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.depth import write_other_depth
from benchmarks.quantization.places import bench_folder
from benchmarks.quantization.rescaling import rescale_channels
from benchmarks.text import texts

LENGTH = 512  # tokens a row
CALIBRATION_ROWS = 16
TEST_ROWS = 16
DRAWS = 3
BLOCKS = 30
SEED = 20


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, all of them real: (rows, length) int64."""

    input_ids: Tensor
    attention_mask: Tensor


def model_folder(blocks: int = BLOCKS) -> Path:
    """Return the folder of the rescaled SmolLM2 with so many blocks, made if it is absent.

    Fewer than its 30 are its first; more are its own over and over.
    """
    folder = bench_folder() / f"model-{blocks}"
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if blocks == BLOCKS:
        _write_rescaled(partial)
    else:
        write_other_depth(model_folder(), blocks, partial)
    partial.rename(folder)
    return folder


def calibration_rows(draw: int) -> Rows:
    """Return the 16 x 512 tokens of a calibration draw; no two draws share a row."""
    return _rows(f"calibration_{draw}")


def evaluation_rows() -> Rows:
    """Return the 16 x 512 tokens of the test text, spread over all of it."""
    return _rows("test")


def tokens_file() -> Path:
    """Return the safetensors file with `calibration_<draw>` and `test`, made if it is absent."""
    from safetensors.torch import save_file

    path = bench_folder() / "tokens.safetensors"
    if not path.exists():
        tensors = _tokenised()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    return path


def _rows(name: str) -> Rows:
    from safetensors.torch import load_file

    ids = load_file(tokens_file())[name]
    return Rows(ids, torch.ones_like(ids))


def _tokenised() -> dict[str, Tensor]:
    from stillroom.models import load_tokenizer

    tokenizer = load_tokenizer(model_folder())
    valid, test = (_chunks(tokenizer, text) for text in texts())
    order = torch.randperm(len(valid), generator=torch.Generator().manual_seed(SEED))
    draws = order[: DRAWS * CALIBRATION_ROWS].view(DRAWS, CALIBRATION_ROWS)
    spread = torch.linspace(0, len(test) - 1, TEST_ROWS).long()
    calibration = {f"calibration_{i}": valid[draw].clone() for i, draw in enumerate(draws)}
    return calibration | {"test": test[spread].clone()}


def _chunks(tokenizer: object, text: str) -> Tensor:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[operator]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def _write_rescaled(folder: Path) -> None:
    from stillroom.builtin import import_builtin
    from stillroom.models import load_model, load_tokenizer, save_model

    shipped = bench_folder() / "shipped"
    import_builtin("smollm2", shipped)
    model = load_model(shipped)
    probe = torch.arange(1000, 1128)[None]
    with torch.no_grad():
        before = model(probe).logits
        rescale_channels(model, torch.Generator().manual_seed(SEED))
        change = float((model(probe).logits - before).abs().max() / before.abs().max())
    if change > 1e-5:
        raise ArithmeticError(f"rescaling changed the logits by {change:.1e} of the largest")
    save_model(model, load_tokenizer(shipped), folder)
