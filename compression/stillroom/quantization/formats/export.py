"""Write a quantized model as a GPTQ checkpoint folder, which transformers and gptqmodel load."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.blocks import find_weights, weight_at
from stillroom.evaluation.figures import ReloadCheck
from stillroom.memory import return_free_memory
from stillroom.models import Task, quiet
from stillroom.quantization.formats.shards import SHARD_BYTES, ShardWriter
from stillroom.quantization.packing import pack
from stillroom.quantization.sequential import QuantizationResult
from stillroom.quantization.streaming import streamed_logits
from stillroom.streamed import Blocks, InMemory, open_streamed


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    result: QuantizationResult,
    folder: Path,
    *,
    blocks: Blocks | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a GPTQ checkpoint (format version 1) of the model that `result` came from.

    Its quantized layers are stored packed, everything else as it is in the model. The blocks come
    from `blocks` one at a time, and no more than one shard is in memory.
    """
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in _tensors(model, result, blocks or InMemory()):
        writer.add(name, tensor)
    writer.finish()
    # The name of the folder it came from says nothing on another machine, and changes the bytes.
    model.config._name_or_path = ""
    model.config.architectures = [type(model).__name__]
    with quiet():
        model.config.save_pretrained(str(folder))
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = quantization_config(result)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_folder(folder: Path, result: QuantizationResult, task: Task, device: str) -> ReloadCheck:
    """Load a checkpoint afresh, one block at a time, and compare its logits with those of the run.

    The logits are those of the first calibration rows, padding left out.
    """
    model, blocks = open_streamed(folder, task=task, device=device)
    after = streamed_logits(model, blocks, result.rows).float()
    before = result.logits.float()
    if before.dim() == 3:
        real = result.rows.mask.bool()
        before, after = before[real], after[real]  # (tokens, vocab)
    return ReloadCheck(float((before - after).abs().max()), float(before.abs().max()))


def quantization_config(result: QuantizationResult) -> dict[str, Any]:
    """Return the section of config.json from which readers learn how to unpack the weights."""
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
        "block_name_to_quantize": result.stacks[0],
        "meta": {"quantizer": [writer], "method": options.method, "damping": options.damping},
    }
    if options.damping is not None and 0 < options.damping < 1:  # the range transformers accepts
        section["damp_percent"] = options.damping
    if result.skipped:
        section["modules_in_block_to_quantize"] = [[name] for name in result.layers]
    mixed = _mixed(result)
    if mixed:
        section["dynamic"] = mixed
    return section


def _mixed(result: QuantizationResult) -> dict[str, dict[str, int]]:
    """Return gptqmodel's `dynamic` section: the layers that differ from the rest."""
    from stillroom.quantization.allocation import LayerChoice, dynamic_section

    options = result.options
    layers = {}
    for account in result.accounts:
        whole_row = options.group_size == -1
        group = -1 if whole_row and account.bits == options.bits else account.group_size
        layers[account.name] = LayerChoice(account.bits, group)
    return dynamic_section(layers, LayerChoice(options.bits, options.group_size))


def _tensors(
    model: PreTrainedModel, result: QuantizationResult, blocks: Blocks
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint by name; tied ones once."""
    inside = tuple(f"{stack}." for stack in result.stacks)
    written: set[int] = set()
    for name, weight in result.embeddings.items():
        written.add(weight_at(model, name).stored.data_ptr())
        for part, tensor in pack(weight).tensors().items():
            yield f"{name}.{part}", tensor
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) and tensor.data_ptr() not in written:
            written.add(tensor.data_ptr())
            yield name, tensor
    for stack in result.stacks:
        for index in range(len(model.get_submodule(stack))):  # type: ignore[arg-type]
            prefix = f"{stack}.{index}"
            blocks.load(prefix)
            yield from _block_tensors(model, result, prefix)
            blocks.release(prefix)
            return_free_memory()


def _block_tensors(
    model: PreTrainedModel, result: QuantizationResult, prefix: str
) -> Iterator[tuple[str, Tensor]]:
    names = [name for name in result.layers if name.startswith(f"{prefix}.")]
    own = {
        f"{prefix}.{key}": value for key, value in model.get_submodule(prefix).state_dict().items()
    }
    packed: set[int] = set()  # the parameters of which layers are packed
    for name in names:
        layer = result.layers[name]
        for part, tensor in pack(layer.weight).tensors().items():
            yield f"{name}.{part}", tensor
        if layer.bias is not None:
            own[f"{name}.bias"] = layer.bias.to(own[f"{name}.bias"].dtype)
        weight = weight_at(model, name)
        packed.add(getattr(weight.module, weight.parameter).data_ptr())
    for key, value in own.items():
        if value.data_ptr() not in packed:
            yield key, value
    # Experts that are not packed, beside packed ones of the same parameter.
    for name, weight in find_weights(model.get_submodule(prefix)).items():
        whole = getattr(weight.module, weight.parameter).data_ptr()
        if whole in packed and f"{prefix}.{name}" not in result.layers:
            yield f"{prefix}.{name}.weight", weight.read()
