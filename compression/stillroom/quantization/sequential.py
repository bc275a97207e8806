"""Quantize a model block by block, each behind the blocks already quantized."""

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import Tensor

from stillroom.blocks import LinearWeight, find_stacks
from stillroom.checkpoint import Checkpoints, FolderCheckpoints, NoCheckpoints
from stillroom.errors import DataError, NotFiniteError
from stillroom.memory import return_free_memory
from stillroom.progress import Progress, silent
from stillroom.quantization.capture import BlockCaller, CalibrationRows, Place, Rows
from stillroom.quantization.choices import Choices, warn_of_unseen
from stillroom.quantization.embeddings import round_embeddings
from stillroom.quantization.inputs import Round, collect, plan_rounds, watch_inputs
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.pieces import Pieces, QuantizedLayer, work_fingerprint
from stillroom.quantization.solving import solve_group, write_layer
from stillroom.quantization.streaming import (
    Activations,
    Stream,
    rows_to_check,
)
from stillroom.quantization.weight import LayerAccount, QuantizedWeight, warn_of_fallbacks
from stillroom.streamed import Blocks, InMemory

# Of the calibration rows, one in so many is kept apart to choose on, once there are so many.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class QuantizationResult:
    """Every quantized layer by its dotted name, and what is needed to write and check a folder."""

    layers: Pieces
    skipped: tuple[str, ...]  # layers inside the blocks that keep their weights
    stacks: tuple[str, ...]  # dotted names of the lists of blocks
    options: QuantizationOptions
    rows: Rows  # some calibration rows
    logits: Tensor  # what the quantized model makes of them
    embeddings: Mapping[str, QuantizedWeight]  # input embeddings and head, where they were rounded

    @property
    def accounts(self) -> list[LayerAccount]:
        """Return what each layer cost."""
        return list(self.layers.accounts.values())

    @property
    def fallbacks(self) -> int:
        """Return how many layers were rounded to nearest although more was asked for."""
        return sum(account.fell_back for account in self.accounts)


@torch.no_grad()
def quantize_model(
    model: Any,
    calibration: CalibrationRows,
    options: QuantizationOptions,
    *,
    blocks: Blocks | None = None,
    layer_options: Mapping[str, QuantizationOptions] | None = None,
    skip: tuple[str, ...] = (),
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> QuantizationResult:
    """Quantize the linear layers inside the model's blocks.

    Each block sees the outputs of the quantized blocks before it; of the model only the blocks in
    `blocks` are needed, one at a time, and the hidden states wait on disk. A model in memory is
    changed in place. Layers whose dotted name fits a pattern in `skip` stay as they are, as do
    embeddings and heads; `layer_options` gives single layers others than `options`. Each finished
    block is kept in `checkpoints`; a later call with the same arguments continues behind it and
    gives the same bytes.

    Raises:
        RecipeError: a layer cannot be quantized with these options.
        DataError: there are no calibration rows.
        MismatchError: the checkpoints were made with other options or other rows.
        NotFiniteError: a weight, an input or an output is NaN or infinite.
    """
    if checkpoints is None or isinstance(checkpoints, NoCheckpoints):
        checkpoints = _passing_checkpoints()
    choices = Choices(options, layer_options or {}, skip)
    stacks = find_stacks(model)
    skipped = choices.check(stacks)
    warn_of_unseen(stacks)
    pieces = Pieces(
        checkpoints,
        work_fingerprint(choices.settings(), calibration.input_ids, calibration.attention_mask),
    )
    model.train(False)
    embeddings = round_embeddings(model) if options.embedding_bits else {}
    batches, held_out = _batches(model, calibration, options)
    caller = BlockCaller(model, stacks)
    with caller.entered(), TemporaryDirectory() as scratch:
        run = _Run(caller, batches, held_out, choices, pieces, blocks or InMemory(), Path(scratch))
        run.all_blocks(progress)
        rows, logits = run.check.batches[0], run.check.logits(0)
    warn_of_fallbacks(list(pieces.accounts.values()))
    return QuantizationResult(pieces, skipped, tuple(stacks), options, rows, logits, embeddings)


def compared_rows(model: Any, calibration: CalibrationRows, options: QuantizationOptions) -> Rows:
    """Return the calibration rows that `quantize_model` computes the result's logits on."""
    batches, _ = _batches(model, calibration, options)
    return rows_to_check(model, batches[0])


def _passing_checkpoints() -> Checkpoints:
    """Return checkpoints in a folder that goes when nobody needs them any more."""
    folder = mkdtemp()
    checkpoints = FolderCheckpoints(Path(folder))
    weakref.finalize(checkpoints, shutil.rmtree, folder, ignore_errors=True)
    return checkpoints


class _Run:
    """The calibration rows on their way through the quantized blocks and through the originals.

    A few tokens go through the quantized blocks apart, in full precision, to compare with what is
    written.
    """

    def __init__(
        self,
        caller: BlockCaller,
        batches: list[Rows],
        held_out: set[int],
        choices: Choices,
        pieces: Pieces,
        blocks: Blocks,
        scratch: Path,
    ) -> None:
        self.caller, self.held_out, self.choices = caller, held_out, choices
        self.pieces, self.blocks, self.scratch = pieces, blocks, scratch
        precision = choices.options.matmul_precision
        self.now = Stream(caller, batches, scratch / "now", precision)
        self.check = Stream(caller, [rows_to_check(caller.model, batches[0])], scratch / "check")
        self.original: Stream | None = None
        if choices.options.cross_layer and choices.options.method == "gptq" and held_out:
            self.original = Stream(caller, batches, scratch / "original", precision)
        self._plans: dict[tuple[str, ...], tuple[Round, ...]] = {}

    def all_blocks(self, progress: Progress) -> None:
        """Quantize every block of every stack."""
        total = sum(len(stack) for stack in self.caller.stacks.values())
        done = 0
        streams = [each for each in (self.now, self.original, self.check) if each]
        for _ in self.caller.stacks:
            (stack, *_) = [stream.enter() for stream in streams]
            for index, block in enumerate(self.caller.stacks[stack]):
                prefix = f"{stack}.{index}"
                self.blocks.load(prefix)
                self._block(Place(stack, index), prefix, self.choices.weights(prefix, block))
                self.blocks.release(prefix)
                return_free_memory()
                done += 1
                progress(done, total, "blocks", prefix)
            for stream in streams:
                stream.leave(stack)

    def _block(self, place: Place, prefix: str, weights: dict[str, LinearWeight]) -> None:
        """Quantize a block, or take it as it was kept, and let every batch go through it."""
        if self.pieces.has(prefix):
            if self.original:
                self.original.advance(place)
            for name, layer in self.pieces.load(prefix).items():
                write_layer(weights[name], layer)
        else:
            solved = self._solved(place, weights)
            self.pieces.save(prefix, {name: solved[name] for name in weights})
        self.check.advance(place)
        for largest in self.now.advance(place):
            if not bool(torch.isfinite(largest)):
                raise NotFiniteError(
                    f"{prefix}: the quantized block gives a NaN or an infinity on the calibration "
                    f"rows; compute the model in float32 or bfloat16, or use more bits"
                )

    def _solved(self, place: Place, weights: dict[str, LinearWeight]) -> dict[str, QuantizedLayer]:
        """Return the quantized layers of a block, written into the model round by round."""
        rounds = self._rounds(place, weights)
        inputs: Activations | None = None
        if self.original:
            inputs = Activations(self.scratch / "inputs")
            watched = [name for each in rounds for name in each.watched]
            watch_inputs(self.original, place, weights, watched, inputs)
        solved: dict[str, QuantizedLayer] = {}
        for each in rounds:
            sums = collect(self.now, place, weights, each.watched, each.once, self.held_out, inputs)
            fresh: dict[str, QuantizedLayer] = {}
            for group in each.groups:
                fresh |= solve_group(group, weights, sums.get(group[0]), self.choices)
            # Only now: layers of the same round see one another's full-precision outputs.
            for name, layer in fresh.items():
                write_layer(weights[name], layer)
            solved |= fresh
            return_free_memory()
        for name in weights.keys() - solved.keys():
            solved |= solve_group((name,), weights, None, self.choices)
            write_layer(weights[name], solved[name])
        if inputs:
            inputs.delete()
        return solved

    def _rounds(self, place: Place, weights: dict[str, LinearWeight]) -> tuple[Round, ...]:
        """Return the rounds of a block; blocks with the same layers share a plan.

        A plan that lacks a layer is of its block alone: rows may reach the layer in another.
        """
        prefix = f"{place.stack}.{place.index}."
        named = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        layout = tuple(named)
        plan = self._plans.get(layout) or plan_rounds(self.now, place, named)
        if sum(len(group) for each in plan for group in each.groups) == len(named):
            self._plans[layout] = plan
        rounds = tuple(
            Round(tuple(tuple(f"{prefix}{n}" for n in group) for group in each.groups), each.once)
            for each in plan
        )
        options = self.choices.options
        # Rounding asks nothing of the inputs; they only measure its error.
        if options.true_sequential and options.method != "rtn":
            return rounds
        groups = tuple(group for each in rounds for group in each.groups)
        return (Round(groups, all(each.once for each in rounds)),) if rounds else ()


def _batches(
    model: Any, rows: CalibrationRows, options: QuantizationOptions
) -> tuple[list[Rows], set[int]]:
    """Return the rows in batches, and the numbers of those that are held out to choose on.

    Rows of padding alone are left out.
    """
    real = rows.attention_mask.any(1)
    ids, mask = rows.input_ids[real], rows.attention_mask[real]
    if not len(ids):
        raise DataError("quantization needs calibration rows, and there are none: add text")
    device = next(p.device for p in model.parameters() if not p.is_meta)
    apart = torch.zeros(len(ids), dtype=torch.bool)
    if options.wants_held_out_rows and len(ids) >= HELD_OUT_EVERY:
        apart[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
    batches: list[Rows] = []
    held_out: set[int] = set()
    for chosen in (~apart, apart):
        for part in torch.split(torch.nonzero(chosen)[:, 0], options.batch_rows):
            if len(part) == 0:
                continue
            if bool(apart[part[0]]):
                held_out.add(len(batches))
            batches.append(Rows(ids[part].to(device), mask[part].to(device)))
    return batches, held_out
