"""Quantize a model folder with this library and write the dense weights; a process of its own.

    python -m benchmarks.quantization.ours JOB.json

The job is the same as the peers', and may name besides: `rows`, other than the draw's 16;
`checkpoints`, a folder to continue from; `kill_after`, the blocks after which the process dies.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.quantization.peers.costs import Costs


def main(job: dict[str, Any]) -> None:
    """Do the job and leave `out`.packed, `out`.safetensors and `out`.json."""
    costs = Costs()
    from safetensors.torch import load_file, save_file

    from benchmarks.quantization.work import Rows
    from stillroom.quantization.formats.folder import open_quantized

    options = _options(job)
    ids = load_file(job["tokens"])[f"calibration_{job['draw']}"]
    ids = ids.repeat(2, 1)[: job.get("rows", len(ids))]
    costs.loaded()
    packed = Path(job["out"] + ".packed")
    _quantize(job, Rows(ids, ids.new_ones(ids.shape)), options, packed)
    costs.finished()
    report = costs.report() | {"options": {name: str(each) for name, each in vars(options).items()}}
    if job.get("dense", True):
        folder = open_quantized(packed)
        dense = {name: folder.weight(name).dequantize() for name in folder.layers}
        save_file(dense, job["out"] + ".safetensors")
        parts = (part for name in dense for part in folder.packed(name)[0].tensors().values())
        report["stored_bytes"] = sum(part.numel() * part.element_size() for part in parts)
    Path(job["out"] + ".json").write_text(json.dumps(report, indent=1))


def _options(job: dict[str, Any]) -> Any:
    from stillroom.quantization.options import QuantizationOptions, plain

    options = QuantizationOptions(
        bits=job["bits"],
        group_size=job["group_size"],
        symmetric=job["symmetric"],
        method="rtn" if job["variant"] == "rtn" else "gptq",
    )
    return plain(options) if job["variant"] == "plain" else options


def _quantize(job: dict[str, Any], rows: Any, options: Any, target: Path) -> None:
    """Make the call that a user makes; the checkpoints are there to continue behind a kill."""
    from stillroom.checkpoint import FolderCheckpoints
    from stillroom.quantization.formats.export import save_quantized
    from stillroom.quantization.sequential import quantize_model
    from stillroom.streamed import open_streamed

    def stop(done: int, total: int, unit: str, note: str = "") -> None:
        if done == job.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    kept = Path(job["checkpoints"]) if "checkpoints" in job else None
    model, blocks = open_streamed(Path(job["model"]), task="causal_lm")
    result = quantize_model(
        model,
        rows,
        options,
        blocks=blocks,
        checkpoints=FolderCheckpoints(kept) if kept else None,
        progress=stop,
    )
    save_quantized(model, None, result, target, blocks=blocks)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
