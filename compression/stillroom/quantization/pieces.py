"""Finished blocks as checkpoints: packed tensors and their accounting."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from stillroom.checkpoint import Checkpoints
from stillroom.errors import MismatchError
from stillroom.quantization.packing import PARTS, PackedWeight, pack, unpack
from stillroom.quantization.weight import LayerAccount, QuantizedWeight

TENSORS = "weights.safetensors"
ACCOUNTS = "accounts.json"


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's integers, its bias where that was corrected, and what making them cost."""

    weight: QuantizedWeight
    account: LayerAccount
    bias: Tensor | None = None  # (out,)


class Pieces(Mapping[str, QuantizedLayer]):
    """The quantized layers by dotted name, kept block by block where checkpoints are kept.

    Accounts are in memory, weights are read when they are asked for.
    """

    def __init__(self, checkpoints: Checkpoints, fingerprint: str) -> None:
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self.finished = set(checkpoints.names())
        self.accounts: dict[str, LayerAccount] = {}
        self._piece_of: dict[str, str] = {}
        self._last: tuple[str, dict[str, QuantizedLayer]] = ("", {})

    def has(self, prefix: str) -> bool:
        """Return whether the block with this dotted name is kept."""
        return piece_name(prefix) in self.finished

    def save(self, prefix: str, layers: Mapping[str, QuantizedLayer]) -> None:
        """Keep the layers of a block."""
        from safetensors.torch import save_file

        piece = piece_name(prefix)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            for part, tensor in pack(layer.weight).tensors().items():
                tensors[f"{name}.{part}"] = tensor.cpu()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.cpu().contiguous()
        listing = {
            "fingerprint": self.fingerprint,
            "layers": [asdict(layer.account) for layer in layers.values()],
        }
        with TemporaryDirectory() as folder:
            save_file(tensors, Path(folder) / TENSORS)
            (Path(folder) / ACCOUNTS).write_text(json.dumps(listing, sort_keys=True))
            self.checkpoints.save(piece, Path(folder))
        self._note(piece, layers)

    def load(self, prefix: str) -> dict[str, QuantizedLayer]:
        """Return the layers of a block that is kept.

        Raises:
            MismatchError: they were made with other options or from other rows.
        """
        piece = piece_name(prefix)
        layers = self._read(piece)
        self._note(piece, layers)
        return layers

    def __getitem__(self, name: str) -> QuantizedLayer:
        """Return one layer."""
        piece = self._piece_of[name]
        if self._last[0] != piece:
            self._last = (piece, self._read(piece))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order in which the blocks were done."""
        return iter(self.accounts)

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.accounts)

    def _note(self, piece: str, layers: Mapping[str, QuantizedLayer]) -> None:
        for name, layer in layers.items():
            self.accounts[name] = layer.account
            self._piece_of[name] = piece

    def _read(self, piece: str) -> dict[str, QuantizedLayer]:
        from safetensors.torch import load_file

        with TemporaryDirectory() as folder:
            self.checkpoints.load(piece, Path(folder))
            listing = json.loads((Path(folder) / ACCOUNTS).read_text())
            if listing["fingerprint"] != self.fingerprint:
                raise MismatchError(
                    f"checkpoint {piece} was made with other options or calibration rows than "
                    "these; delete it, or keep checkpoints of different work apart"
                )
            tensors = load_file(Path(folder) / TENSORS)
        layers: dict[str, QuantizedLayer] = {}
        for entry in listing["layers"]:
            account = LayerAccount(**entry)
            packed = PackedWeight(*(tensors[f"{account.name}.{part}"] for part in PARTS))
            weight, bias = unpack(packed, account.bits), tensors.get(f"{account.name}.bias")
            layers[account.name] = QuantizedLayer(weight, account, bias)
        return layers


def piece_name(prefix: str) -> str:
    """Return the name under which a block is kept: `model.layers.3` as block-model.layers-0003."""
    stack, _, index = prefix.rpartition(".")
    return f"block-{stack}-{int(index):04d}"


def work_fingerprint(settings: object, ids: Tensor, mask: Tensor) -> str:
    """Return a SHA-256 of what decides a block's bytes besides the model."""
    digest = hashlib.sha256(json.dumps([settings, list(ids.shape)], sort_keys=True).encode())
    for tensor in (ids, mask):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
