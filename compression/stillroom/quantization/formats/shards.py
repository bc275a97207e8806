"""Write a model folder one tensor at a time, so that no more than one file of it is in memory."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.errors import SourceError
from stillroom.folder import WHOLE, filling
from stillroom.memory import return_free_memory
from stillroom.quantization.formats.folder import INDEX, WEIGHTS

SHARD_BYTES = 32 * 2**20
# What other quantizers write beside config.json; after a conversion it would contradict it.
STALE = ("quantize_config.json", "quant_config.json", "quant_log.csv")
# The old weights, in formats that can run code too, and the indices of their shards.
WEIGHTS_END_IN = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".index.json")
CHAT_TEMPLATES = "additional_chat_templates"  # all but the first


class ShardWriter:
    """The safetensors files of a folder, each written as soon as it is full.

    The files get their final names in `finish`: until then the folder holds no model.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []  # the names of the tensors in each file

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the tensor with its file, now or later."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._held_bytes += size

    def finish(self) -> None:
        """Write what is left, give the files their names and, if there are several, an index."""
        if self._held:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(sorted(self._held))
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0
        return_free_memory()

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


@contextmanager
def new_folder(folder: Path, target: Path) -> Iterator[Path]:
    """Give a folder to write in that becomes `target` at the end, and vanishes on any failure.

    It holds already what is neither weights nor config.json in `folder`, such as the tokenizer.

    Raises:
        SourceError: `target` lies inside `folder`.
        StoreError: it holds something, or cannot be written to.
    """
    if folder.resolve() in target.resolve().parents:
        raise SourceError(f"{target} lies inside {folder}, which it is made from; choose another")
    with filling(target) as scratch:
        written = scratch / WHOLE
        written.mkdir()
        for path in sorted(folder.iterdir()):
            replaced = path.name in ("config.json", *STALE) or path.name.endswith(WEIGHTS_END_IN)
            if path.is_file() and not replaced:
                shutil.copyfile(path, written / path.name)
        if (folder / CHAT_TEMPLATES).is_dir():
            shutil.copytree(folder / CHAT_TEMPLATES, written / CHAT_TEMPLATES)
        yield written


def write_config(config: dict[str, Any], target: Path) -> None:
    """Write config.json, as one writes it by hand: indented, keys sorted."""
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
