"""Run the teacher once over all rows and keep, on disk, what it said at each position."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.data.examples import Examples
from stillroom.distillation.cache_files import (
    CacheFacts,
    CacheKind,
    TeacherCache,
    identity,
    shard_file,
    shard_name,
    write_facts,
)
from stillroom.distillation.sampling import SparseDistribution, round_to_half, sparsify
from stillroom.errors import DataError, MismatchError, NotFiniteError, RecipeError
from stillroom.progress import Progress, silent
from stillroom.training.options import derived_seed
from stillroom.training.state import require_same

__all__ = ["CacheFacts", "CacheKind", "CacheOptions", "TeacherCache", "capture"]

CHUNK = 128
"""Positions whose (CHUNK, vocab) running sums, in float64, are in memory at once."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the teacher's outputs, and in which portions they are computed.

    `head` words are kept exactly and `draws` are drawn from the rest ("sampled"); "top_k" keeps
    the head alone, renormalised, and is biased; "dense" keeps every logit.
    """

    kind: CacheKind = "sampled"
    head: int = 4
    draws: int = 8
    temperature: float = 1.0
    rows_per_shard: int = 16
    batch_rows: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(
                f"temperature must be above 0, {self.temperature} came; 1 leaves logits as they are"
            )
        if (self.kind == "top_k" and self.head < 1) or (self.kind == "sampled" and self.draws < 1):
            raise RecipeError(
                "a sampled teacher cache needs draws >= 1, a top_k one head >= 1: "
                f"head {self.head} and draws {self.draws} came"
            )


def capture(
    teacher: nn.Module,
    examples: Examples,
    folder: Path,
    options: CacheOptions,
    *,
    tokenizer_hash: str,
    fingerprint: str = "",
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> TeacherCache:
    """Write the teacher's targets of all rows into `folder`, and return their reader.

    A finished shard is a checkpoint piece shard-00003: a rerun loads it instead of computing it,
    and the folder has the same bytes as after an uninterrupted run. `tokenizer_hash` is the
    teacher's own, `fingerprint` names the teacher. Classifiers are kept "dense", one row of logits
    a row, whatever the kind.

    Raises:
        DataError: there is no row.
        MismatchError: the rows were made with another tokenizer; a checkpoint is of other work.
        NotFiniteError: the teacher's logits are NaN or infinite.
    """
    if len(examples) == 0:
        raise DataError("teacher cache: expected at least one row of tokens, got none; add text")
    if tokenizer_hash != examples.tokenizer_hash:
        raise MismatchError(
            f"the rows were made with tokenizer {examples.tokenizer_hash[:12]}, the teacher has "
            f"{tokenizer_hash[:12]}; prepare the data again with the teacher's tokenizer"
        )
    checkpoints = checkpoints or NoCheckpoints()
    folder.mkdir(parents=True, exist_ok=True)
    hashes = examples.row_hashes()
    done = set(checkpoints.names())
    with _asking(teacher):
        facts = _facts(teacher, examples, options, fingerprint, tuple(hashes))
        for number, start in enumerate(range(0, len(examples), options.rows_per_shard)):
            rows = slice(start, min(start + options.rows_per_shard, len(examples)))
            seal = identity(facts) | {"rows": hashes[rows], "batch_rows": options.batch_rows}
            if shard_name(number) in done:
                _restore(checkpoints, number, seal, folder)
            else:
                arrays = _shard(teacher, examples.take(rows), hashes[rows], facts, options)
                save_file(arrays, folder / shard_file(number))
                _keep(checkpoints, number, seal, folder)
            progress(rows.stop, len(examples), "rows")
    write_facts(folder, facts, shards=number + 1)
    return TeacherCache.open(folder)


@contextmanager
def _asking(teacher: nn.Module) -> Iterator[None]:
    before = teacher.training
    teacher.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        teacher.train(before)


def _facts(
    teacher: nn.Module,
    examples: Examples,
    options: CacheOptions,
    fingerprint: str,
    hashes: tuple[str, ...],
) -> CacheFacts:
    # One row is asked: the logits' width can exceed both the tokenizer's and the config's count.
    vocabulary = _logits(teacher, examples.take(slice(0, 1))).shape[-1]
    kind: CacheKind = "dense" if examples.label_names else options.kind
    head = 0 if kind == "dense" else min(options.head, vocabulary)
    return CacheFacts(
        kind=kind,
        head=head,
        draws=options.draws if kind == "sampled" else 0,
        temperature=options.temperature,
        seed=options.seed,
        rows_per_shard=options.rows_per_shard,
        vocabulary=vocabulary,
        sequence_length=examples.input_ids.shape[1],
        tokenizer_hash=examples.tokenizer_hash,
        teacher=fingerprint,
        row_hashes=hashes,
    )


def _logits(teacher: nn.Module, examples: Examples) -> Tensor:
    device = next(teacher.parameters()).device
    decoder = {} if examples.label_names else {"use_cache": False}
    logits: Tensor = teacher(
        input_ids=examples.input_ids.to(device),
        attention_mask=examples.attention_mask.to(device),
        **decoder,
    ).logits
    return logits


def _shard(
    teacher: nn.Module,
    examples: Examples,
    hashes: list[str],
    facts: CacheFacts,
    options: CacheOptions,
) -> Arrays:
    rows: list[Arrays] = []
    for start in range(0, len(examples), options.batch_rows):
        part = examples.take(slice(start, start + options.batch_rows))
        logits = _logits(teacher, part)  # (batch, length, vocab) or (batch, labels)
        for i in range(len(part)):
            mask = part.attention_mask[i].bool().to(logits.device)
            if not examples.label_names:
                logits[i, ~mask] = 0.0
            if not torch.isfinite(logits[i]).all():
                raise NotFiniteError(
                    "teacher cache: the teacher's logits are NaN or infinite on the row with hash "
                    f"{hashes[start + i][:12]}; expected finite numbers: load it in another dtype"
                )
            if facts.kind == "dense":
                rows.append({"logits": logits[i].float().cpu().numpy()})
            else:
                rows.append(_sparse_row(logits[i], mask, hashes[start + i], facts))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _sparse_row(logits: Tensor, mask: Tensor, row_hash: str, facts: CacheFacts) -> Arrays:
    # One stream of numbers a row, drawn on the CPU: the same on every device and in every batch.
    generator = torch.Generator().manual_seed(derived_seed(facts.seed, row_hash))
    shape = (len(logits), facts.draws + facts.head + 1)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).to(logits.device)
    chunks = []
    for start in range(0, len(logits), CHUNK):
        here = slice(start, start + CHUNK)
        probabilities = torch.softmax(logits[here].float() / facts.temperature, -1)
        probabilities = probabilities.masked_fill(~mask[here].unsqueeze(-1), 0.0)
        kept = sparsify(probabilities, facts.head, uniforms[here, : facts.draws])
        chunks.append(_pack(kept, mask[here], uniforms[here, facts.draws :], facts))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _pack(kept: SparseDistribution, mask: Tensor, uniforms: Tensor, facts: CacheFacts) -> Arrays:
    ids = np.uint16 if facts.vocabulary <= 2**16 else np.int32
    arrays: Arrays = {"entropy": kept.entropy.cpu().numpy()}
    if facts.head:
        probabilities = kept.head_probabilities
        if facts.kind == "top_k":
            total = probabilities.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            half = (probabilities / total).half()
        else:
            half = round_to_half(probabilities, uniforms[:, : facts.head])
        head_ids = kept.head_ids.masked_fill(~mask.unsqueeze(-1), 0)
        arrays["head_ids"] = head_ids.cpu().numpy().astype(ids)
        arrays["head_probabilities"] = half.cpu().numpy()
    if facts.draws:
        arrays["tail_ids"] = kept.tail_ids.cpu().numpy().astype(ids)
        arrays["tail_mass"] = round_to_half(kept.tail_mass, uniforms[:, facts.head]).cpu().numpy()
    return arrays


def _keep(checkpoints: Checkpoints, number: int, seal: dict[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        piece = Path(temporary)
        shutil.copyfile(folder / shard_file(number), piece / shard_file(number))
        (piece / "seal.json").write_text(json.dumps(seal, sort_keys=True))
        checkpoints.save(shard_name(number), piece)


def _restore(checkpoints: Checkpoints, number: int, seal: dict[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        piece = Path(temporary)
        checkpoints.load(shard_name(number), piece)
        require_same(shard_name(number), json.loads((piece / "seal.json").read_text()), seal)
        shutil.copyfile(piece / shard_file(number), folder / shard_file(number))
