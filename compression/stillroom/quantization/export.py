"""Write a quantized model as a GPTQ checkpoint folder, which transformers and gptqmodel load."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.models import quiet
from stillroom.quantization.packing import pack
from stillroom.quantization.sequential import QuantizationResult


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    result: QuantizationResult,
    folder: Path,
) -> None:
    """Write a GPTQ checkpoint (format version 1) of the model that `result` came from.

    Its quantized layers are stored packed, everything else as it is in the model.
    """
    state = dict(model.state_dict())
    for name, layer in result.layers.items():
        del state[f"{name}.weight"]
        for part, tensor in pack(layer.weight).tensors().items():
            state[f"{name}.{part}"] = tensor
    # The name of the folder it came from says nothing on another machine, and changes the bytes.
    model.config._name_or_path = ""
    with quiet():
        model.save_pretrained(str(folder), state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization_config(result)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def quantization_config(result: QuantizationResult) -> dict[str, Any]:
    """Return the section of config.json from which readers learn how to unpack the weights."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        writer = f"stillroom:{version('stillroom')}"
    except PackageNotFoundError:
        writer = "stillroom:0"
    options = result.options
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        # Act-order with static groups leaves the columns in place.
        "desc_act": False,
        "static_groups": options.act_order,
        "true_sequential": options.true_sequential,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": result.blocks,
        "meta": {"quantizer": [writer], "method": options.method, "damping": options.damping},
    }
    if 0 < options.damping < 1:  # the range that transformers accepts
        section["damp_percent"] = options.damping
    if result.skipped:
        section["modules_in_block_to_quantize"] = [[name] for name in result.layers]
    return section
