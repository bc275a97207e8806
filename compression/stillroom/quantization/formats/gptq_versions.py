"""Turn a GPTQ checkpoint of version 1 into one of version 2, and back.

Version 1 stores zero points less one (auto-gptq's way), version 2 as they are.
"""

from dataclasses import replace
from pathlib import Path

from stillroom.errors import MismatchError
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.formats.shards import SHARD_BYTES, ShardWriter, new_folder, write_config
from stillroom.quantization.packing import (
    CheckpointFormat,
    PackedWeight,
    pack_rows,
    unpack_zeros,
)


def convert_gptq(
    folder: Path,
    target: Path,
    checkpoint_format: CheckpointFormat,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the GPTQ checkpoint in `folder` to `target` in the given version of the format.

    Integers, scales and the order of columns stay as they are, and so does every other tensor.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint.
        StoreError: `target` is not empty, or cannot be written.
        MismatchError: a zero point is 0, which version 1 cannot hold.
    """
    source = open_quantized(folder)
    section = source.config["quantization_config"] | {"checkpoint_format": checkpoint_format}
    section.pop("format", None)  # the same under gptqmodel's newer name
    with new_folder(folder, target) as written:
        writer = ShardWriter(written, shard_bytes)
        for name in source.layers:
            packed, bits = source.packed(name)
            packed = convert_zeros(packed, bits, source.checkpoint_format, checkpoint_format, name)
            for part, tensor in packed.tensors().items():
                writer.add(f"{name}.{part}", tensor)
        for name in source.plain:
            writer.add(name, source.files[name])
        writer.finish()
        write_config(source.config | {"quantization_config": section}, written)


def convert_zeros(
    packed: PackedWeight,
    bits: int,
    version: CheckpointFormat,
    wanted: CheckpointFormat,
    name: str = "the layer",
) -> PackedWeight:
    """Return the packed tensors with their zero points stored as `wanted` stores them.

    Raises:
        MismatchError: a zero point is 0 and version 1 is wanted.
    """
    if version == wanted:
        return packed
    zeros = unpack_zeros(packed.qzeros, bits, version)  # (groups, out)
    if wanted == "gptq":
        empty = int((zeros == 0).sum())
        if empty:
            raise MismatchError(
                f"version 1 of the GPTQ format holds zero points from 1: {empty} of {name} are 0, "
                f"and readers of version 1 disagree about them; keep version 2"
            )
        zeros = zeros - 1
    qzeros = pack_rows(zeros.T, bits).T.contiguous()  # (groups, out * bits / 32)
    return replace(packed, qzeros=qzeros)
