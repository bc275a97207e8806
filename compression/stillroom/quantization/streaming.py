"""Hidden states that wait on disk while a model's blocks come one at a time."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.blocks import find_stacks
from stillroom.quantization.capture import BlockCaller, Place, Rows
from stillroom.quantization.precision import MatmulPrecision, matmul_precision
from stillroom.streamed import Blocks

Side = tuple[Any, ...] | None
LOGITS_AT_ONCE = 1 << 24


class Activations:
    """Hidden states of all batches, one file each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def write(self, name: str | int, hidden: Tensor) -> None:
        """Keep a tensor under a name, in place of an older one."""
        from safetensors.torch import save_file

        save_file({"hidden": hidden.cpu().contiguous()}, self._path(name))

    def read(self, name: str | int, device: torch.device) -> Tensor:
        """Return the tensor that was kept under `name`."""
        from safetensors.torch import load

        # Through a buffer: a mapped file would count as memory as long as the tensor lives.
        return load(self._path(name).read_bytes())["hidden"].to(device)

    def has(self, name: str | int) -> bool:
        """Return whether anything was kept under `name`."""
        return self._path(name).exists()

    def drop(self, name: str | int) -> None:
        """Delete what was kept under `name`, if anything."""
        self._path(name).unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete the folder and all that was kept."""
        shutil.rmtree(self.folder)

    def _path(self, name: str | int) -> Path:
        return self.folder / f"{name}.safetensors"


class Stream:
    """All batches on their way through the blocks, with the hidden states of each on disk."""

    def __init__(
        self,
        caller: BlockCaller,
        batches: list[Rows],
        folder: Path,
        precision: MatmulPrecision = "highest",
    ) -> None:
        self.caller = caller
        self.batches = batches
        self.precision = precision
        self.device = batches[0].ids.device
        folder.mkdir(exist_ok=True)
        self.hidden = {name: Activations(folder / name.replace(".", "-")) for name in caller.stacks}
        self.sides: list[dict[str, Side]] = [{} for _ in batches]
        self._finished: list[str] = []

    def enter(self) -> str:
        """Let every batch come to the first block of the next stack; return the stack's name."""
        for b, rows in enumerate(self.batches):
            stack, entry = self.caller.entry(rows, self._left(b), self.sides[b])
            self.hidden[stack].write(b, entry)
        return stack

    def run(self, place: Place, b: int) -> Tensor:
        """Return what the block makes of batch `b`, (rows, length, hidden), and leave it there."""
        hidden = self.hidden[place.stack].read(b, self.device)
        with matmul_precision(self.precision):
            output, side = self.caller.call(
                place, hidden, self.batches[b], self._left(b), self.sides[b]
            )
        self.sides[b].setdefault(place.stack, side)
        return output

    def advance(self, place: Place) -> list[Tensor]:
        """Let every batch go through a block; return the largest value of each, (1,)."""
        largest = []
        for b, rows in enumerate(self.batches):
            output = self.run(place, b)
            largest.append(output[rows.mask.bool()].abs().max())
            self.hidden[place.stack].write(b, output)
        return largest

    def leave(self, stack: str) -> None:
        """Say that all blocks of `stack` are done."""
        self._finished.append(stack)

    def logits(self, b: int) -> Tensor:
        """Return the model's logits for batch `b`; all stacks must be left."""
        return self.caller.finish(self.batches[b], self._left(b), self.sides[b])

    def _left(self, b: int) -> dict[str, Tensor]:
        return {name: self.hidden[name].read(b, self.device) for name in self._finished}


@torch.no_grad()
def streamed_logits(model: PreTrainedModel, blocks: Blocks, rows: Rows) -> Tensor:
    """Return the logits of some rows with one block at a time in memory."""
    caller = BlockCaller(model, find_stacks(model))
    with caller.entered(), TemporaryDirectory() as folder:
        stream = Stream(caller, [rows], Path(folder))
        for _ in caller.stacks:
            stack = stream.enter()
            for index in range(len(caller.stacks[stack])):
                prefix = f"{stack}.{index}"
                blocks.load(prefix)
                stream.advance(Place(stack, index))
                blocks.release(prefix)
            stream.leave(stack)
        return stream.logits(0)


def rows_to_check(model: Any, rows: Rows) -> Rows:
    """Return the first tokens of some rows: as many as there is room for 2^24 logits, at least one.

    Of an encoder-decoder, and where logits are few, they are all.
    """
    config = model.config
    if not hasattr(config, "vocab_size") or config.is_encoder_decoder:
        return rows
    length = min(rows.ids.shape[1], max(1, LOGITS_AT_ONCE // config.vocab_size))
    count = max(1, LOGITS_AT_ONCE // config.vocab_size // length)
    return Rows(rows.ids[:count, :length], rows.mask[:count, :length])
