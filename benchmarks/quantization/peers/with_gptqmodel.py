"""Quantize a model folder with GPTQModel and write the dense weights; runs in its environment.

    python with_gptqmodel.py JOB.json

The job names `model`, `tokens`, `draw`, `bits`, `group_size`, `symmetric`, `variant` and `out`.
"""

import json
import sys
from pathlib import Path

from costs import Costs

# "best" is, of the documented options that were tried on this work, the set with the lowest KL: see
# the benchmark's README. Columns are reordered for good, which static groups would not do.
VARIANTS: dict[str, dict] = {
    "default": {},
    "best": {
        "dtype": "float32",
        "mse": 2.4,
        "damp_percent": 0.1,
        "desc_act": True,
        "act_group_aware": False,
    },
}
OPTIONS = (
    "sym",
    "desc_act",
    "act_group_aware",
    "static_groups",
    "true_sequential",
    "damp_percent",
    "damp_auto_increment",
    "mse",
    "gptaq",
    "foem",
)


def main(job: dict) -> None:
    """Do the job and leave `out`.safetensors and `out`.json."""
    costs = Costs()
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from safetensors.torch import load_file, save_file

    ids = load_file(job["tokens"])[f"calibration_{job['draw']}"]
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    chosen = VARIANTS[job["variant"]] | job.get("options", {})
    if job["group_size"] == -1:
        # Its default reorders groups, and is refused where there are none.
        chosen["act_group_aware"] = False
    # Without a dtype it takes bfloat16 on a CPU, whatever the checkpoint holds.
    dtype = getattr(torch, chosen.pop("dtype", ""), "auto")
    chosen = {name: _built(name, value) for name, value in chosen.items()}
    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], sym=job["symmetric"], **chosen
    )
    costs.loaded()
    model = GPTQModel.load(job["model"], config, device="cpu", dtype=dtype)
    model.quantize(calibration, batch_size=1)
    packed = Path(job["out"] + ".packed")
    model.save(str(packed))
    costs.finished()
    used = {name: str(getattr(config, name)) for name in OPTIONS} | {"dtype": str(dtype)}
    report = costs.report() | {"options": used}
    if job.get("dense", True):
        loaded = GPTQModel.load(str(packed), backend=BACKEND.GPTQ_TORCH, device="cpu")
        dense, report["stored_bytes"] = _dense(loaded)
        save_file(dense, job["out"] + ".safetensors")
    Path(job["out"] + ".json").write_text(json.dumps(report, indent=1))


def _built(name: str, value: object) -> object:
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    match name:
        case "gptaq":
            return GPTAQConfig(**value)
        case "foem":
            return FOEMConfig(**value)
    return value


def _dense(model: object) -> tuple[dict, int]:
    """Return GPTQModel's own dequantized weights, (out, in) by name, and the bytes they take."""
    dense, stored = {}, 0
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            parts = (module.qweight, module.qzeros, module.scales, module.g_idx)
            stored += sum(part.numel() * part.element_size() for part in parts)
            module.scales = module.scales.float()
            dense[name] = module.dequantize_weight().T.float().contiguous()
    return dense, stored


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
