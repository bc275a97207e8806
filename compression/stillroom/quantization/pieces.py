"""Finished blocks as checkpoints: packed tensors and their accounting."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from stillroom.checkpoint import Checkpoints
from stillroom.errors import MismatchError
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import PARTS, PackedWeight, pack, unpack
from stillroom.quantization.weight import LayerAccount, QuantizedWeight

TENSORS = "weights.safetensors"
ACCOUNTS = "accounts.json"

Layers = Mapping[str, tuple[QuantizedWeight, LayerAccount]]


def piece_name(index: int) -> str:
    """Return the name under which block `index` is kept."""
    return f"block-{index:04d}"


def work_fingerprint(
    options: QuantizationOptions, skip: tuple[str, ...], ids: Tensor, mask: Tensor, batch_size: int
) -> str:
    """Return a SHA-256 of what decides a block's bytes besides the model."""
    settings = json.dumps([asdict(options), skip, list(ids.shape), batch_size], sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for tensor in (ids, mask):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_piece(checkpoints: Checkpoints, index: int, fingerprint: str, layers: Layers) -> None:
    """Keep the quantized layers of block `index`."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (weight, _) in layers.items():
        for part, tensor in pack(weight).tensors().items():
            tensors[f"{name}.{part}"] = tensor.cpu()
    listing = {
        "fingerprint": fingerprint,
        "layers": [{"bits": weight.bits, **asdict(account)} for weight, account in layers.values()],
    }
    with TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / TENSORS)
        (Path(folder) / ACCOUNTS).write_text(json.dumps(listing, sort_keys=True))
        checkpoints.save(piece_name(index), Path(folder))


def load_piece(
    checkpoints: Checkpoints, index: int, fingerprint: str
) -> dict[str, tuple[QuantizedWeight, LayerAccount]]:
    """Return the quantized layers of block `index`.

    Raises:
        MismatchError: they were made with other options or from other rows.
    """
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder:
        checkpoints.load(piece_name(index), Path(folder))
        listing = json.loads((Path(folder) / ACCOUNTS).read_text())
        if listing["fingerprint"] != fingerprint:
            raise MismatchError(
                f"checkpoint {piece_name(index)} was made with other options or calibration rows "
                f"than these; delete it, or keep checkpoints of different work apart"
            )
        tensors = load_file(Path(folder) / TENSORS)
    layers: dict[str, tuple[QuantizedWeight, LayerAccount]] = {}
    for entry in listing["layers"]:
        bits = entry.pop("bits")
        account = LayerAccount(**entry)
        packed = PackedWeight(*(tensors[f"{account.name}.{part}"] for part in PARTS))
        layers[account.name] = (unpack(packed, bits), account)
    return layers
