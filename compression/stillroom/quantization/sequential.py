"""Quantize a model block by block, each behind the blocks already quantized."""

import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stillroom.blocks import find_blocks, find_linears, read_weight, write_weight
from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.errors import DataError, NotFiniteError, NotPositiveDefiniteError, RecipeError
from stillroom.progress import Progress, silent
from stillroom.quantization.capture import Batch, capture, collect_hessians, input_groups
from stillroom.quantization.gptq import gptq
from stillroom.quantization.options import QuantizationOptions, check_fits
from stillroom.quantization.pieces import load_piece, piece_name, save_piece, work_fingerprint
from stillroom.quantization.rounding import round_to_nearest
from stillroom.quantization.weight import LayerAccount, QuantizedWeight, Solution

logger = logging.getLogger(__name__)


class CalibrationRows(Protocol):
    """Tokenised rows, (rows, length) int64 each; the mask is 1 at real tokens."""

    @property
    def input_ids(self) -> Tensor:
        """Return the token ids."""

    @property
    def attention_mask(self) -> Tensor:
        """Return the mask."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's integers and what making them cost."""

    weight: QuantizedWeight
    account: LayerAccount


@dataclass(frozen=True)
class QuantizationResult:
    """Every quantized layer by its dotted name, in the model's order."""

    layers: dict[str, QuantizedLayer]
    skipped: tuple[str, ...]  # layers inside the blocks that keep their weights
    blocks: str  # dotted name of the list of blocks
    options: QuantizationOptions

    @property
    def accounts(self) -> list[LayerAccount]:
        """Return what each layer cost."""
        return [layer.account for layer in self.layers.values()]

    @property
    def fallbacks(self) -> int:
        """Return how many layers were rounded to nearest although GPTQ was asked for."""
        return sum(account.fell_back for account in self.accounts)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    calibration: CalibrationRows,
    options: QuantizationOptions,
    *,
    skip: tuple[str, ...] = (),
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
    batch_size: int = 4,
) -> QuantizationResult:
    """Quantize the linear layers inside the model's blocks, in place.

    Each block sees the outputs of the quantized blocks before it. Layers whose dotted name fits a
    pattern in `skip` stay as they are, as do embeddings and heads. Each finished block is kept
    in `checkpoints`; a later call with the same arguments continues behind it and gives the same
    bytes. `batch_size` is in rows.

    Raises:
        RecipeError: a layer cannot be quantized with these options.
        DataError: there are no calibration rows.
        MismatchError: the checkpoints were made with other options or other rows.
        NotFiniteError: a weight, an input or an output is NaN or infinite.
    """
    checkpoints = checkpoints or NoCheckpoints()
    prefix, blocks = find_blocks(model)
    chosen, skipped = _choose(prefix, blocks, options, skip)
    fingerprint = work_fingerprint(
        options, skip, calibration.input_ids, calibration.attention_mask, batch_size
    )
    model.train(False)
    batches = _batches(model, blocks, calibration, batch_size)
    finished = set(checkpoints.names())
    result: dict[str, QuantizedLayer] = {}
    for index, block in enumerate(blocks):
        linears = chosen[index]
        if piece_name(index) in finished:
            solved = {
                name: QuantizedLayer(weight, account)
                for name, (weight, account) in load_piece(checkpoints, index, fingerprint).items()
            }
            for name, linear in linears.items():
                write_weight(linear, solved[name].weight.dequantize())
        else:
            solved = _quantize_block(block, index, linears, batches, options)
            pieces = {name: (layer.weight, layer.account) for name, layer in solved.items()}
            save_piece(checkpoints, index, fingerprint, pieces)
        result |= {name: solved[name] for name in linears}
        _advance(block, index, batches, f"{prefix}.{index}")
        progress(index + 1, len(blocks), "blocks", f"{prefix}.{index}")
    _warn_of_fallbacks(result)
    return QuantizationResult(result, skipped, prefix, options)


def _choose(
    prefix: str, blocks: nn.ModuleList, options: QuantizationOptions, skip: tuple[str, ...]
) -> tuple[list[dict[str, nn.Module]], tuple[str, ...]]:
    """Return the layers to quantize in each block by full name, and the names left out."""
    chosen: list[dict[str, nn.Module]] = []
    skipped: list[str] = []
    for index, block in enumerate(blocks):
        named = {f"{prefix}.{index}.{name}": each for name, each in find_linears(block).items()}
        out = [name for name in named if any(fnmatch(name, pattern) for pattern in skip)]
        skipped += out
        chosen.append({name: each for name, each in named.items() if name not in out})
        for name, linear in chosen[-1].items():
            out_features, in_features = read_weight(linear).shape
            check_fits(options, out_features, in_features, name)
    everything = [*skipped, *(name for named in chosen for name in named)]
    idle = [pattern for pattern in skip if not any(fnmatch(name, pattern) for name in everything)]
    if idle or not any(chosen):
        raise RecipeError(
            f"skip must fit some of the layers, not all and not none: {', '.join(idle or skip)}; "
            f"the first layer is {everything[0]}"
        )
    return chosen, tuple(skipped)


def _batches(
    model: nn.Module, blocks: nn.ModuleList, rows: CalibrationRows, batch_size: int
) -> list[Batch]:
    if not len(rows.input_ids) or not int(rows.attention_mask.sum()):
        raise DataError("quantization needs calibration rows, and there are none: add text")
    device = next(model.parameters()).device
    parts = zip(
        torch.split(rows.input_ids, batch_size),
        torch.split(rows.attention_mask, batch_size),
        strict=True,
    )
    return [capture(model, blocks, ids.to(device), mask.to(device)) for ids, mask in parts]


def _quantize_block(
    block: nn.Module,
    index: int,
    linears: dict[str, nn.Module],
    batches: list[Batch],
    options: QuantizationOptions,
) -> dict[str, QuantizedLayer]:
    """Quantize the layers of a block in the order in which they get their inputs."""
    groups = input_groups(block, index, linears, batches[0])
    rounds = [[group] for group in groups] if options.true_sequential else [groups]
    solved: dict[str, QuantizedLayer] = {}
    for together in rounds:
        first = {group[0]: linears[group[0]] for group in together}
        hessians = collect_hessians(block, index, first, batches)
        for group in together:
            for name in group:
                solved[name] = _quantize_layer(name, linears[name], hessians.get(group[0]), options)
        # Only now: layers of the same round see one another's full-precision outputs.
        for group in together:
            for name in group:
                write_weight(linears[name], solved[name].weight.dequantize())
    for name in linears.keys() - solved.keys():
        solved[name] = _quantize_layer(name, linears[name], None, options)
        write_weight(linears[name], solved[name].weight.dequantize())
    return solved


def _quantize_layer(
    name: str, linear: nn.Module, H: Tensor | None, options: QuantizationOptions
) -> QuantizedLayer:
    """Quantize one layer; round it where the calibration rows say nothing about its inputs."""
    W = read_weight(linear).float()
    if not bool(torch.isfinite(W).all()):
        raise NotFiniteError(f"{name}: the weight holds a NaN or an infinity; check the model")
    if H is not None and not bool(torch.isfinite(H).all()):
        raise NotFiniteError(
            f"{name}: its inputs on the calibration rows hold a NaN or an infinity; "
            f"compute the model in float32 or bfloat16"
        )
    method: Literal["gptq", "rtn"] = options.method
    solution: Solution | None = None
    if method == "gptq" and H is not None and bool((H.diagonal() > 0).any()):
        try:
            solution = gptq(W, H, options)
        except NotPositiveDefiniteError as error:
            logger.warning("%s is rounded to nearest: %s", name, error)
    if solution is None:
        method = "rtn"
        solution = round_to_nearest(W, options, H)
    account = LayerAccount(
        name=name,
        method=method,
        fell_back=method != options.method,
        relative_error=solution.relative_error,
        damping=solution.damping,
        clipped=solution.clipped,
        weights=W.numel(),
        dead_inputs=0 if H is None else int((H.diagonal() == 0).sum()),
    )
    return QuantizedLayer(solution.weight, account)


def _advance(block: nn.Module, index: int, batches: list[Batch], name: str) -> None:
    """Replace each batch's hidden states by the block's outputs."""
    for batch in batches:
        batch.hidden = batch.calls[index].run(block, batch.hidden)
        if not bool(torch.isfinite(batch.hidden[batch.mask]).all()):
            raise NotFiniteError(
                f"{name}: the quantized block gives a NaN or an infinity on the calibration rows; "
                f"compute the model in float32 or bfloat16, or use more bits"
            )


def _warn_of_fallbacks(layers: dict[str, QuantizedLayer]) -> None:
    names = [name for name, layer in layers.items() if layer.account.fell_back]
    if names:
        logger.warning(
            "%d of %d layers were rounded to nearest instead of GPTQ, first %s: the calibration "
            "rows do not reach them, or their Hessian cannot be inverted",
            len(names),
            len(layers),
            names[0],
        )
