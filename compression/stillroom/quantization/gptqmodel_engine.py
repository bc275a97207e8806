"""Quantize with gptqmodel instead of our own solver: the same folder, the same accounting.

gptqmodel is optional (`make install-gptqmodel`). It does GPTQ with its own act-order and scales;
what goes beyond that in our options (searched damping, refinement, the cross-layer term, bias
correction, the weighted grid) it does not have. It takes the whole model into memory.
"""

from fnmatch import translate
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.blocks import find_blocks, find_stacks
from stillroom.errors import RecipeError
from stillroom.models import load_config, load_model, new_model, quiet, read_config, saved_dtype
from stillroom.quantization.capture import CalibrationRows
from stillroom.quantization.choices import Choices
from stillroom.quantization.formats.convert import task_of
from stillroom.quantization.formats.folder import QuantizedFolder, open_quantized
from stillroom.quantization.formats.shards import ShardWriter, new_folder, write_config
from stillroom.quantization.losses import Loss, measure_losses
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import CheckpointFormat, pack
from stillroom.quantization.weight import LayerAccount, warn_of_fallbacks

MEASURED_ROWS = 16


def quantize_with_gptqmodel(
    folder: Path,
    calibration: CalibrationRows,
    options: QuantizationOptions,
    output: Path,
    *,
    skip: tuple[str, ...] = (),
) -> list[LayerAccount]:
    """Quantize the model in `folder` with gptqmodel, write our folder to `output`, return accounts.

    `output` has our layout: version 1 of the format, or version 2 where gptqmodel chose a zero
    point of 0, which version 1 cannot hold. Errors are measured by us behind the quantized layers,
    on the first 16 rows; clipped weights are counted against the original weights. Layers whose
    dotted name fits a pattern in `skip` stay as they are.

    Raises:
        RecipeError: gptqmodel is not installed, or does not know the method; or a pattern in `skip`
            fits no layer, or all of them.
        MismatchError: it quantized layers that the model does not have.
        StoreError: `output` is not empty, or cannot be written.
    """
    if find_spec("gptqmodel") is None:
        raise RecipeError(
            "quantization.engine gptqmodel needs the package gptqmodel, which is not installed: "
            "run `make install-gptqmodel`, or use the engine stillroom"
        )
    if options.method != "gptq":
        raise RecipeError(
            f"the engine gptqmodel does gptq, got method {options.method}; use the engine stillroom"
        )
    config = load_config(folder)
    task = task_of(config.architectures)
    with quiet(), torch.device("meta"):
        empty = new_model(folder, config, task=task, dtype=torch.float32)
    Choices(options, {}, skip).skipped(find_stacks(empty))
    rows = [
        ids[mask.bool()]
        for ids, mask in zip(calibration.input_ids, calibration.attention_mask, strict=True)
    ]
    with TemporaryDirectory() as temporary:
        theirs = Path(temporary) / "model"
        log = _run(folder, [row for row in rows if len(row)], options, skip, theirs)
        result = open_quantized(theirs)
        model = load_model(folder, task=task, dtype=torch.float32)
        losses = measure_losses(model, result, rows[:MEASURED_ROWS])
        accounts = [account_for(name, losses[name], log) for name in result.layers]
        _write(folder, model, result, options, accounts, output)
    warn_of_fallbacks(accounts)
    return accounts


def _run(
    folder: Path,
    rows: list[Tensor],
    options: QuantizationOptions,
    skip: tuple[str, ...],
    target: Path,
) -> list[dict[str, Any]]:
    """Let gptqmodel write its checkpoint to `target`; return its log, one entry a layer."""
    from gptqmodel import GPTQModel, QuantizeConfig

    section = engine_config(options, skip) | {
        "offload_to_disk_path": str(target.parent / "offload")
    }
    model = GPTQModel.load(str(folder), QuantizeConfig(**section), dtype=torch.float32)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(samples, batch_size=1, calibration_data_min_length=1)
    model.save(str(target))
    return list(model.quant_log)


def engine_config(options: QuantizationOptions, skip: tuple[str, ...]) -> dict[str, Any]:
    """Return gptqmodel's settings for our options, by its names."""
    whole_rows = options.group_size == -1
    section: dict[str, Any] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        # Its act-order with groups that stay in place needs groups; with one group a row the
        # columns may be reordered, because all of them share a scale.
        "act_group_aware": options.act_order and not whole_rows,
        "desc_act": options.act_order and whole_rows,
        "true_sequential": options.true_sequential,
        "format": "gptq_v2",  # its version 1 borrows between neighbours where a zero point is 0
    }
    if options.damping is not None and 0 < options.damping < 1:
        section["damp_percent"] = options.damping
    if skip:
        section["dynamic"] = {f"-:{translate(pattern)}": {} for pattern in skip}
    return section


def account_for(name: str, loss: Loss, log: list[dict[str, Any]]) -> LayerAccount:
    """Return the account of a layer from what was measured and from gptqmodel's log.

    A layer that the log calls a fallback, or does not mention, was not done by GPTQ.
    """
    entries: list[dict[str, Any]] = [
        each for each in log if name.endswith(f".{each['layer']}.{each['module']}")
    ]
    entry = entries[0] if entries else {"loss": "fallback", "damp": "0"}
    fell_back = "fallback" in str(entry["loss"]) or "nan" in str(entry["loss"]).lower()
    return LayerAccount(
        name=name,
        method="rtn" if fell_back else "gptq",
        fell_back=fell_back,
        relative_error=loss.relative_error,
        damping=0.0 if fell_back else float(entry["damp"]),
        clipped=loss.clipped,
        weights=loss.original.numel(),
        dead_inputs=int((torch.as_tensor(loss.largest_inputs) == 0).sum()),
        bits=loss.weight.bits,
        group_size=loss.weight.group_size,
    )


def _write(
    folder: Path,
    model: PreTrainedModel,
    result: QuantizedFolder,
    options: QuantizationOptions,
    accounts: list[LayerAccount],
    output: Path,
) -> None:
    """Write the layers of `result` and the rest of the model as our folder."""
    weights = {name: result.weight(name) for name in result.layers}
    unstorable = any(bool((weight.zeros == 0).any()) for weight in weights.values())
    version_of_format: CheckpointFormat = "gptq_v2" if unstorable else "gptq"
    config = read_config(folder)
    dtype = saved_dtype(config)
    seen: set[int] = set()
    with new_folder(folder, output) as written:
        writer = ShardWriter(written)
        for name, tensor in model.state_dict().items():
            owner, _, last = name.rpartition(".")
            if last == "weight" and owner in weights:
                for part, packed in pack(weights[owner], version_of_format).tensors().items():
                    writer.add(f"{owner}.{part}", packed)
            elif tensor.data_ptr() not in seen:  # tied tensors are stored once
                seen.add(tensor.data_ptr())
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        writer.finish()
        section = quantization_section(options, accounts, find_blocks(model)[0])
        section["checkpoint_format"] = version_of_format
        write_config(config | {"quantization_config": section}, written)


def quantization_section(
    options: QuantizationOptions, accounts: list[LayerAccount], blocks: str
) -> dict[str, Any]:
    """Return the section of config.json for layers in the list of blocks named `blocks`."""
    damping = max((account.damping for account in accounts), default=0.0)
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "desc_act": False,  # the columns are where they were
        "static_groups": options.act_order,
        "true_sequential": options.true_sequential,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": blocks,
        "modules_in_block_to_quantize": [[account.name] for account in accounts],
        "meta": {
            "quantizer": [f"gptqmodel:{version('gptqmodel')}"],
            "method": options.method,
            "damping": damping,
        },
    }
