"""Quantize a model folder with bitsandbytes' nf4 and write the dense weights.

    python with_bitsandbytes.py JOB.json

Runs in llm-compressor's environment. The job names `model`, `variant` and `out`. There is no
calibration: the values of nf4 are the quantiles of a normal distribution, scaled by each block of
64 weights' largest. "default" keeps those scales in fp32, "best" quantizes them too.
"""

import json
import sys
from pathlib import Path

from costs import Costs

BLOCK_SIZE = 64


def main(job: dict) -> None:
    """Do the job and leave `out`.safetensors and `out`.json."""
    costs = Costs()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file, save_file

    costs.loaded()
    dense, stored = {}, 0
    nested = job["variant"] == "best"
    for name, weight in load_file(Path(job["model"]) / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight"):
            continue
        packed, state = quantize_4bit(
            weight, blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type="nf4"
        )
        stored += packed.numel() * packed.element_size() + state.absmax.numel() * (
            1 if nested else 4
        )
        stored += state.state2.absmax.numel() * 4 if nested else 0
        dense[name.removesuffix(".weight")] = dequantize_4bit(packed, state).float()
    costs.finished()
    save_file(dense, job["out"] + ".safetensors")
    used = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "compress_statistics": nested}
    report = costs.report() | {"stored_bytes": stored, "options": used}
    Path(job["out"] + ".json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
