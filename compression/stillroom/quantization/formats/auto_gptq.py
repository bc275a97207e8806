"""Write a GPTQ checkpoint as auto-gptq 0.7.1, the last release, and transformers 4.40 read it.

The packed tensors are those of version 1. What differs is around them: auto-gptq looks for its
settings in a file of their own, leaves a head that is tied to the embeddings uninitialised unless
it is stored, and transformers of that time reads other names in config.json. Inside the blocks it
takes every linear layer for a packed one, all of the same bits and group size: others' shapes do
not fit, and what it does not find it leaves at zero without an error.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.models import saved_dtype
from stillroom.quantization.formats.compressed_tensors import find_places
from stillroom.quantization.formats.folder import QuantizedFolder, open_quantized
from stillroom.quantization.formats.gptq_versions import convert_zeros
from stillroom.quantization.formats.shards import SHARD_BYTES, ShardWriter, new_folder, write_config
from stillroom.quantization.packing import PackedWeight

SETTINGS = "quantize_config.json"


def export_auto_gptq(folder: Path, target: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the GPTQ checkpoint in `folder` to `target`, in version 1, for auto-gptq.

    Embeddings and the head are unpacked.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint.
        StoreError: `target` is not empty, or cannot be written.
        MismatchError: layers differ in bits or group size, one inside the blocks is not packed, a
            zero point is 0, or experts are fused.
    """
    source = open_quantized(folder)
    section = source.config["quantization_config"] | {"checkpoint_format": "gptq"}
    section.pop("format", None)  # the same under gptqmodel's newer name
    places = find_places(source)
    _refuse_fused(places.fused)
    _require_whole_blocks(source, places.in_blocks)
    with new_folder(folder, target) as written:
        writer = ShardWriter(written, shard_bytes)
        for name in source.layers:
            if name in places.dense:
                dense = source.weight(name).dequantize(saved_dtype(source.config))
                writer.add(f"{name}.weight", dense)
                continue
            packed, bits = source.packed(name)
            _require_same(packed, bits, section, name)
            packed = convert_zeros(packed, bits, source.checkpoint_format, "gptq", name)
            for part, tensor in packed.tensors().items():
                writer.add(f"{name}.{part}", tensor)
        for name in source.plain:
            writer.add(name, source.files[name])
        for head in places.head:
            if f"{head}.weight" not in source.files and head not in source.layers:
                writer.add(f"{head}.weight", _embeddings(source, places.embeddings[0]))
        writer.finish()
        (written / SETTINGS).write_text(json.dumps(settings(section), indent=2) + "\n")
        config = config_of_its_time(source.config)
        write_config(config | {"quantization_config": section}, written)


def _refuse_fused(fused: list[str]) -> None:
    if fused:
        raise MismatchError(
            f"the experts of this mixture are parts of one parameter: {len(fused)}, first "
            f"{fused[0]}. transformers 4.40, which auto-gptq needs, has modules of other names, "
            "and would leave them as they began; keep the GPTQ format"
        )


def _require_whole_blocks(source: QuantizedFolder, in_blocks: list[str]) -> None:
    packed = set(source.layers)
    if skipped := [name for name in in_blocks if name not in packed]:
        raise MismatchError(
            f"auto-gptq takes every linear layer inside the blocks for a packed one: {len(skipped)}"
            f", first {skipped[0]}, are not; use the format compressed-tensors, or quantize "
            "without quantization.skip"
        )


def _require_same(packed: PackedWeight, bits: int, section: dict[str, Any], name: str) -> None:
    if bits != section["bits"]:
        raise MismatchError(
            f"auto-gptq holds layers of the same bits: {name} has {bits}, the checkpoint "
            f"says {section['bits']}; use the format compressed-tensors"
        )
    columns, groups, size = len(packed.g_idx), len(packed.scales), section["group_size"]
    if groups != (1 if size == -1 else -(-columns // size)):
        raise MismatchError(
            f"auto-gptq holds layers of the same group_size: {name} has {groups} groups in "
            f"{columns} columns, the checkpoint says {size}; use the format compressed-tensors, or "
            "quantize without quantization.mixed.group_sizes"
        )


def _embeddings(source: QuantizedFolder, name: str) -> Tensor:
    """Return a copy of the token embeddings, (vocabulary, hidden), which the head is tied to."""
    if name in source.layers:
        return source.weight(name).dequantize(saved_dtype(source.config))
    return source.files[f"{name}.weight"].clone()


def settings(section: dict[str, Any]) -> dict[str, Any]:
    """Return auto-gptq's quantize_config.json for our section of config.json."""
    damping = section.get("damp_percent", 0.01)
    return {
        "bits": section["bits"],
        "group_size": section["group_size"],
        "damp_percent": damping,
        "desc_act": section["desc_act"],
        "static_groups": section.get("static_groups", False),
        "sym": section["sym"],
        "true_sequential": section.get("true_sequential", True),
        "is_marlin_format": False,
    }


def config_of_its_time(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that transformers 4.40 reads too: its names beside today's.

    Raises:
        MismatchError: its positions are scaled in a way that one number does not say.
    """
    old = dict(config)
    if "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    positions = config.get("rope_parameters") or {}
    if positions.get("rope_type", "default") != "default":
        raise MismatchError(
            f"transformers 4.40 knows plain rotary positions by their rope_theta, got "
            f"{positions['rope_type']}; use another format"
        )
    if "rope_theta" in positions:
        old["rope_theta"] = positions["rope_theta"]
    return old
