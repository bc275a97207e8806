"""Write a GPTQ checkpoint in the format of compressed-tensors, which vLLM and transformers load.

`pack-quantized` keeps a layer's integers in 32-bit words bit by bit, as GPTQ checkpoints do, but
along the columns of (out, in); zero points are packed along the rows and stored as they are. So
the packed tensors are those of GPTQ's version 2, transposed. Symmetric layers store none: their
zero point is 2^(bits - 1). (compressed-tensors 0.20, `compressors/pack_quantized`.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.blocks import find_stacks, find_weights
from stillroom.errors import MismatchError, SourceError
from stillroom.models import load_config, saved_dtype
from stillroom.quantization.formats.folder import QuantizedFolder, open_quantized
from stillroom.quantization.formats.gptq_versions import convert_zeros
from stillroom.quantization.formats.shards import SHARD_BYTES, ShardWriter, new_folder, write_config
from stillroom.quantization.packing import WORD, PackedWeight, has_plain_groups, unpack_zeros
from stillroom.remote_code import refuse_own_code


@dataclass(frozen=True, order=True)
class Scheme:
    """What a config group of compressed-tensors says of its layers."""

    bits: int
    group_size: int  # columns that share a scale; -1: all of a row
    symmetric: bool

    def to_config(self, targets: list[str]) -> dict[str, Any]:
        """Return the config group of the layers that `targets` names."""
        grouped = self.group_size != -1
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False,
        }
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }


def export_compressed_tensors(
    folder: Path, target: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the GPTQ checkpoint in `folder` to `target` as compressed-tensors `pack-quantized`.

    Scales keep their fp16 numbers. Layers of different bits or groups make config groups of
    their own, which name them; linear layers that are not quantized stand in the ignore list.
    Embeddings and the head are unpacked: the format's readers take them in full precision.

    Raises:
        SourceError: `folder` holds no GPTQ checkpoint.
        StoreError: `target` is not empty, or cannot be written.
        MismatchError: a layer is not nn.Linear in its model, has its columns reordered, or has
            3 bits.
    """
    source = open_quantized(folder)
    places = find_places(source)
    foreign = [name for name in source.layers if name not in (*places.linears, *places.dense)]
    if foreign:
        raise MismatchError(
            f"compressed-tensors holds nn.Linear layers: {len(foreign)} layers, first "
            f"{foreign[0]}, are none in this architecture; keep the GPTQ format"
        )
    with new_folder(folder, target) as written:
        writer = ShardWriter(written, shard_bytes)
        schemes: dict[str, Scheme] = {}
        for name in source.layers:
            if name in places.dense:
                dense = source.weight(name).dequantize(saved_dtype(source.config))
                writer.add(f"{name}.weight", dense)
                continue
            packed, bits = source.packed(name)
            schemes[name] = _scheme(packed, bits, source, name)
            for part, tensor in _tensors(packed, schemes[name], source, name):
                writer.add(f"{name}.{part}", tensor)
        for name in source.plain:
            writer.add(name, source.files[name])
        writer.finish()
        ignored = [name for name in places.linears if name not in schemes]
        section = quantization_section(schemes, [*ignored, *places.head])
        write_config(source.config | {"quantization_config": section}, written)


def quantization_section(schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """Return the section of config.json for layers of these schemes, by dotted name."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    ordered = sorted(by_scheme.items())
    uniform = len(ordered) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": scheme.to_config(["Linear"] if uniform else names)
            for number, (scheme, names) in enumerate(ordered)
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@dataclass(frozen=True)
class Places:
    """The dotted names of a model's layers by what the format can do with them."""

    linears: list[str]  # nn.Linear, but for the head
    embeddings: list[str]
    head: list[str]  # none or one
    in_blocks: list[str]  # every weight matrix of the repeated blocks
    fused: list[str]  # those of them that are parts of one parameter, such as experts

    @property
    def dense(self) -> list[str]:
        """Return the layers that are stored in full precision."""
        return [*self.embeddings, *self.head]


def find_places(source: QuantizedFolder) -> Places:
    """Return where the folder's model has its layers; its tensors take no memory.

    Raises:
        SourceError: config.json names no class of transformers.
    """
    import transformers

    refuse_own_code(source.folder, "who reads this format")
    config = load_config(source.folder)
    names = config.architectures or ["none"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise SourceError(
            f"{source.folder}: config.json must name a model class of transformers under "
            f"architectures, got {names[0]}"
        )
    del config.quantization_config
    with torch.device("meta"):
        model = kind(config)
    last = model.get_output_embeddings()
    named = dict(model.named_modules())
    stacks = find_stacks(model)
    in_blocks = [f"{at}.{name}" for at, each in stacks.items() for name in find_weights(each)]
    return Places(
        [name for name, each in named.items() if isinstance(each, nn.Linear) and each is not last],
        [name for name, each in named.items() if isinstance(each, nn.Embedding)],
        [name for name, each in named.items() if each is last],
        in_blocks,
        [name for name in in_blocks if name not in named],
    )


def _scheme(packed: PackedWeight, bits: int, source: QuantizedFolder, name: str) -> Scheme:
    columns, groups = packed.g_idx.shape[0], packed.scales.shape[0]
    if not has_plain_groups(packed.g_idx, groups):
        raise MismatchError(
            f"compressed-tensors needs groups of neighbouring columns, all of one size: those of "
            f"{name} are not, as with desc_act or a group_size that does not divide its {columns} "
            f"columns; quantize it with static groups, and a group_size that does"
        )
    if WORD % bits:
        raise MismatchError(
            f"compressed-tensors holds 2, 4 and 8 bits: {name} has {bits}, whose words versions up "
            f"to 0.17 and from 0.18 on lay out differently; keep the GPTQ format or use other bits"
        )
    section = source.config["quantization_config"]
    # One answer for all layers where it can be: vLLM fuses q, k and v only if their schemes agree.
    symmetric = bool(section.get("sym")) and _is_symmetric(packed, bits, source)
    # A layer of one group could say either; the recipe's group size decides for all of them.
    whole = groups == 1 and section.get("group_size") == -1
    return Scheme(bits, -1 if whole else columns // groups, symmetric)


def _is_symmetric(packed: PackedWeight, bits: int, source: QuantizedFolder) -> bool:
    zeros = unpack_zeros(packed.qzeros, bits, source.checkpoint_format)
    return bool((zeros == 2 ** (bits - 1)).all())


def _tensors(
    packed: PackedWeight, scheme: Scheme, source: QuantizedFolder, name: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layer by their names in the format."""
    columns, out = packed.g_idx.shape[0], packed.scales.shape[1]
    yield "weight_packed", packed.qweight.T  # (out, in * bits / 32) int32
    yield "weight_scale", packed.scales.T  # (out, groups) float16
    yield "weight_shape", torch.tensor([out, columns])
    if not scheme.symmetric:
        version2 = convert_zeros(packed, scheme.bits, source.checkpoint_format, "gptq_v2", name)
        yield "weight_zero_point", version2.qzeros.T  # (out * bits / 32, groups) int32
