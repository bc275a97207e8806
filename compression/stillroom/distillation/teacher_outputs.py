"""The arrays of one piece of a teacher cache: what the teacher said of some rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stillroom.data.examples import Examples
from stillroom.distillation import elias_fano
from stillroom.distillation.cache_files import AUDIT, CacheFacts
from stillroom.distillation.capture_plan import CapturePlan
from stillroom.distillation.sampling import SparseDistribution, joined, round_to_half, sparsify
from stillroom.errors import NotFiniteError
from stillroom.layout import input_device
from stillroom.training.options import derived_seed

CHUNK = 1 << 19
"""Probabilities that a CPU looks at together: with their running sums they fit its cache."""
CHUNK_POSITIONS = 64
"""Positions that another device looks at together."""

Arrays = dict[str, NDArray[Any]]


class _Outputs(NamedTuple):
    """Logits (batch, length, vocab) or (batch, labels); hidden states (batch, length, hidden)."""

    logits: Tensor
    hidden: Tensor | None


def piece_arrays(teacher: nn.Module, plan: CapturePlan, piece: str) -> tuple[Arrays, CacheFacts]:
    """Ask the teacher for the rows of a piece; return its arrays by name, and the cache's facts.

    The layout is that of `stillroom.distillation.cache_files`.

    Raises:
        NotFiniteError: logits or hidden states are NaN, infinite, or too large for float16.
    """
    rows = plan.pieces[piece]
    with_hidden = plan.options.hidden_states == "last"
    found: dict[int, Arrays] = {}
    facts = None
    with _asking(teacher):
        for part in torch.split(_by_length(plan.examples, rows), plan.options.batch_rows):
            outputs = _ask(teacher, plan.examples.take(part), hidden=with_hidden)
            # The logits' width can exceed both the tokenizer's and the config's count of words.
            width = 0 if outputs.hidden is None else outputs.hidden.shape[-1]
            facts = plan.facts(outputs.logits.shape[-1], width)
            arrays = _batch(outputs, plan, part, facts, audit=piece == AUDIT)
            found |= dict(zip(part.tolist(), arrays, strict=True))
    assert facts is not None, "a piece has at least one row"
    in_order = [found[row] for row in range(rows.start, rows.stop)]
    return {name: np.stack([row[name] for row in in_order]) for name in in_order[0]}, facts


def _by_length(examples: Examples, rows: slice) -> Tensor:
    """Return the numbers of `rows`, shorter ones first: batches of one length have no padding."""
    lengths = examples.attention_mask[rows].sum(1)
    order = torch.argsort(lengths, stable=True)
    return torch.arange(rows.start, rows.stop)[order]


@contextmanager
def _asking(teacher: nn.Module) -> Iterator[None]:
    before = teacher.training
    teacher.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        teacher.train(before)


def _ask(teacher: nn.Module, examples: Examples, *, hidden: bool) -> _Outputs:
    device = input_device(teacher)
    further = {} if examples.label_names or examples.masked else {"use_cache": False}
    if hidden:
        further["output_hidden_states"] = True
    asked = examples.without_shared_padding()
    output = teacher(
        input_ids=asked.input_ids.to(device),
        attention_mask=asked.attention_mask.to(device),
        **further,
    )
    # What was not asked about is padding, and holds zeros in any case.
    padding = (0, 0, 0, examples.input_ids.shape[1] - asked.input_ids.shape[1])
    pad = torch.nn.functional.pad
    return _Outputs(
        output.logits if examples.label_names else pad(output.logits, padding),
        pad(output.hidden_states[-1], padding) if hidden else None,
    )


def _batch(
    outputs: _Outputs, plan: CapturePlan, rows: Tensor, facts: CacheFacts, *, audit: bool
) -> list[Arrays]:
    """Return the arrays of each of `rows` (batch,); padding positions hold zeros."""
    masks = plan.examples.attention_mask[rows].bool().to(outputs.logits.device)
    arrays = []
    for i, row_hash in enumerate(plan.hashes[row] for row in rows.tolist()):
        logits, mask = outputs.logits[i], masks[i]
        if not plan.examples.label_names and not mask.all():
            logits[~mask] = 0.0
        _require_finite(logits, row_hash, "logits are NaN or infinite")
        row = (
            {"logits": logits.float().cpu().numpy()}
            if audit or facts.kind == "dense"
            else _sparse_row(logits, mask, row_hash, facts)
        )
        if outputs.hidden is not None and not audit:
            hidden = outputs.hidden[i].masked_fill(~mask.unsqueeze(-1), 0.0).half()
            _require_finite(hidden, row_hash, "hidden states are NaN or beyond float16's 65,504")
            row["hidden"] = hidden.cpu().numpy()
        arrays.append(row)
    return arrays


def _require_finite(values: Tensor, row_hash: str, what: str) -> None:
    # Both ends are NaN where any value is.
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise NotFiniteError(
            f"teacher cache: the teacher's {what} on the row with hash {row_hash[:12]}; "
            "expected finite numbers: load it in another dtype"
        )


def _sparse_row(logits: Tensor, mask: Tensor, row_hash: str, facts: CacheFacts) -> Arrays:
    # One stream of numbers a row, drawn on the CPU: the same on every device and in every batch.
    generator = torch.Generator().manual_seed(derived_seed(facts.seed, row_hash))
    shape = (len(logits), facts.draws + facts.head + 2)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).to(logits.device)
    # What changes nothing takes a pass over the logits all the same.
    unit, full = facts.temperature == 1, bool(mask.all())
    cpu = logits.device.type == "cpu"
    size = max(1, CHUNK // facts.vocabulary) if cpu else CHUNK_POSITIONS
    chunks = []
    for start in range(0, len(logits), size):
        here = slice(start, start + size)
        part = logits[here].float()
        probabilities = torch.softmax(part if unit else part / facts.temperature, -1)
        if not full:
            probabilities = probabilities.masked_fill(~mask[here].unsqueeze(-1), 0.0)
        chunks.append(sparsify(probabilities, facts.head, uniforms[here, : facts.draws]))
    return _pack(joined(chunks), mask, uniforms[:, facts.draws :], facts)


def _pack(kept: SparseDistribution, mask: Tensor, uniforms: Tensor, facts: CacheFacts) -> Arrays:
    arrays: Arrays = {"entropy": round_to_half(kept.entropy, uniforms[:, -1]).cpu().numpy()}
    if facts.head:
        probabilities = kept.head_probabilities
        if facts.kind == "top_k":
            total = probabilities.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            half = (probabilities / total).half()
        else:
            half = round_to_half(probabilities, uniforms[:, : facts.head])
        # The code holds ids in their order, so the probabilities must follow it.
        ids, order = kept.head_ids.masked_fill(~mask.unsqueeze(-1), 0).sort(-1)
        arrays["head_words"] = elias_fano.encode(ids.cpu().numpy(), facts.vocabulary)
        arrays["head_probabilities"] = half.gather(-1, order).cpu().numpy()
    if facts.draws:
        arrays["tail_words"] = elias_fano.encode(kept.tail_ids.cpu().numpy(), facts.vocabulary)
        arrays["tail_mass"] = round_to_half(kept.tail_mass, uniforms[:, facts.head]).cpu().numpy()
    return arrays
