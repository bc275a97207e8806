"""Make a cell's row: run the quantizer in its own process, then measure what it made."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.places import ROOT
from benchmarks.quantization.cells import Cell
from benchmarks.quantization.peers.environments import peer_python
from benchmarks.quantization.places import HERE, bench_folder
from benchmarks.quantization.work import model_folder, tokens_file

TIMEOUT = 3600  # seconds
# What keeps torch, oneDNN and MKL to AVX2.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def row_path(cell: Cell) -> Path:
    """Return the file of a cell's row; it exists when the row is done."""
    return bench_folder() / "rows" / f"{cell.name}.json"


def read_row(cell: Cell) -> dict[str, Any] | None:
    """Return a cell's row, or nothing if it is not done."""
    path = row_path(cell)
    return json.loads(path.read_text()) if path.exists() else None


def make_row(cell: Cell) -> dict[str, Any]:
    """Run a cell, measure it unless only its time counts, and keep the row.

    Raises:
        RuntimeError: the quantizer failed.
    """
    folder = bench_folder() / "running" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = cell.job() | run_job(cell, folder)
    if cell.repeat is None:
        row |= _measure(cell, folder / "out.safetensors")
    path = row_path(cell)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row, indent=1) + "\n")
    partial.rename(path)
    shutil.rmtree(folder)
    return row


def run_job(cell: Cell, folder: Path, **more: Any) -> dict[str, Any]:
    """Run a cell's quantizer with its files in `folder`, and return its report.

    Raises:
        RuntimeError: it failed; the end of what it wrote is in the text.
    """
    job = cell.job() | {
        "model": str(model_folder(cell.blocks)),
        "tokens": str(tokens_file()),
        "out": str(folder / "out"),
        "dense": cell.repeat is None,
        **more,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    with (folder / "log.txt").open("w") as log:
        try:
            done = subprocess.run(
                [*_command(cell), str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT if cell.method == "stillroom" else folder,  # peers write logs there
                env=_environment(cell),
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{cell.name} took more than {TIMEOUT} seconds") from None
    if done.returncode:
        ending = (folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"{cell.name} ended with {done.returncode}: {ending}")
    report: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return report


def _command(cell: Cell) -> list[str]:
    if cell.method == "stillroom":
        return [sys.executable, "-m", "benchmarks.quantization.ours"]
    script = HERE / "peers" / f"with_{cell.method}.py"
    return [str(peer_python(cell.method)), str(script)]


def _environment(cell: Cell) -> dict[str, str]:
    workers = str(os.cpu_count() or 1)
    return {
        **os.environ,
        **(AVX2 if cell.instructions == "avx2" else {}),
        "PYTHONPATH": str(ROOT / "compression"),
        "GOMP_SPINCOUNT": "10000",  # as the pipeline's stages have it; here it serves all libraries
        "GPTQMODEL_CPU_WORKERS": workers,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@cache
def _evaluator() -> Any:
    from benchmarks.quantization.evaluate import Evaluator

    return Evaluator()


def _measure(cell: Cell, file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights = load_file(file)
    evaluation = _evaluator().evaluate(weights)
    return {
        "kl": evaluation.mean_kl,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "row_kl": evaluation.kl,
        "row_nll": evaluation.nll,
        "layers": len(weights),
        "bytes": payload_bytes(cell, [tuple(each.shape) for each in weights.values()]),
    }


def payload_bytes(cell: Cell, shapes: list[tuple[int, int]]) -> int:
    """Return the bytes of integers, 16-bit scales and, if asymmetric, zero points of `bits` bits.

    The same count for all, whatever their files spend on alignment and on zero points that are
    all the same; nf4's scales are fp32.
    """
    total = 0
    for out, columns in shapes:
        groups = out * (1 if cell.group_size == -1 else columns // cell.group_size)
        scale_bits = 32 if cell.method == "bitsandbytes" else 16
        zero_bits = 0 if cell.symmetric else cell.bits
        total += (out * columns * cell.bits + groups * (scale_bits + zero_bits)) // 8
    return total
