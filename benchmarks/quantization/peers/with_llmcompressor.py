"""Quantize a model folder with llm-compressor's GPTQ and write the dense weights.

    python with_llmcompressor.py JOB.json

Runs in llm-compressor's environment. The job names `model`, `tokens`, `draw`, `bits`,
`group_size`, `symmetric`, `variant` and `out`.
"""

import json
import sys
from pathlib import Path

from costs import Costs

# Activation order is static by default. "best" is, of the documented options that were tried on
# this work, the set with the lowest KL: see the benchmark's README.
VARIANTS: dict[str, dict] = {
    "default": {},
    "best": {"observer": "imatrix_mse", "dampening_frac": 0.1},
    "plain": {"actorder": None},
}


def main(job: dict) -> None:
    """Do the job and leave `out`.safetensors and `out`.json."""
    costs = Costs()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ids = load_file(job["tokens"])[f"calibration_{job['draw']}"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    chosen = VARIANTS[job["variant"]] | job.get("options", {})
    scheme = _scheme(job, chosen.pop("observer", None), chosen.pop("observer_kwargs", None))
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], **chosen)
    costs.loaded()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=[modifier],
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    dense, stored = _dense(model, job["bits"])
    model.save_pretrained(job["out"] + ".packed", save_compressed=True)
    costs.finished()
    save_file(dense, job["out"] + ".safetensors")
    used = {
        name: str(getattr(modifier, name)) for name in ("dampening_frac", "actorder", "block_size")
    }
    used["weights"] = str(scheme.weights)
    report = costs.report() | {"stored_bytes": stored, "options": used}
    report["rounded_to_nearest"] = list(modifier._rtn_fallback_module_names)
    Path(job["out"] + ".json").write_text(json.dumps(report, indent=1))


def _scheme(job: dict, observer: str | None, observer_kwargs: dict | None) -> object:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = job["group_size"] != -1
    weights = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        symmetric=job["symmetric"],
        strategy="group" if grouped else "channel",
        **({"group_size": job["group_size"]} if grouped else {}),
        **({"observer": observer} if observer else {}),
        **({"observer_kwargs": observer_kwargs} if observer_kwargs else {}),
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _dense(model: object, bits: int) -> tuple[dict, int]:
    """Return the weights after GPTQ, which lie on their grids, and the bytes they take packed.

    The bytes are those of compressed-tensors' pack-quantized format: whole values in each 32-bit
    word, scales in the model's dtype, packed zero points where they are not all the same.
    """
    dense, stored = {}, 0
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            out, columns = module.weight.shape
            words = -(-columns // (32 // bits))
            stored += out * words * 4 + module.weight_scale.numel() * 4
            if not module.quantization_scheme.weights.symmetric:
                stored += module.weight_zero_point.numel() * bits // 8
            dense[name] = module.weight.detach().float().clone()
    return dense, stored


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
