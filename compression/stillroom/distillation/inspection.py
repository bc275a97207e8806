"""What a teacher cache holds, and how far its targets are from the dense logits of its audit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stillroom.distillation.cache_files import CacheFacts, TeacherCache
from stillroom.distillation.losses import DenseTargets, SoftTargets

CHUNK = 64
"""Positions whose (CHUNK, vocab) float64 distributions are in memory at once."""
ROWS = 64
STEPS = 10_000
"""In which the quantile of the head's mass is counted."""
EDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Between the bins of probability, in which the calibration is measured."""


@dataclass(frozen=True)
class TargetError:
    """How far targets t are from the teacher's distributions p, over the audit's positions.

    `likely_bias` is the mean over positions of Σ (t − p) over the K + M words that the teacher
    likes best: the mass that they have too much, which is the total variation distance to p where
    all mass was moved to them, as top-k does, and 0 in expectation where E[t] = p, because which
    words these are depends on p alone. `bins` hold, for each bin of p, the mean over positions of
    Σ (t − p) over the bin's words, with its standard error. `calibration_error` is half the sum of
    their sizes: the mass that lies in the wrong bin. Targets without bias have some by chance:
    `calibration_noise` is how much is then expected, √(2/π) of the standard errors.
    """

    positions: int
    likely_bias: float
    likely_bias_standard_error: float
    bins: tuple[tuple[float, float], ...]

    @property
    def calibration_error(self) -> float:
        """Half the sum over bins of |mean gap|, a share of the mass."""
        return sum(abs(gap) for gap, _ in self.bins) / 2

    @property
    def calibration_noise(self) -> float:
        """What the calibration error of targets without bias is expected to be."""
        return math.sqrt(2 / math.pi) * sum(error for _, error in self.bins) / 2


@dataclass(frozen=True)
class CacheReport:
    """Figures of a teacher cache; means are over its positions, padding apart.

    Masses are shares of 1; top-k's head, renormalised, has all of it. `audit` compares the targets
    with the dense audit rows, `audit_top_k` what top-k targets of as many words would have been;
    both are None where there is no audit.
    """

    facts: CacheFacts
    rows: int
    positions: int
    bytes_per_token: float
    audit_bytes: int
    head_mass: float
    head_mass_low: float
    """Its 5 % quantile over positions, to 0.0001."""
    tail_mass: float
    entropy_nats: float
    words_per_position: float
    """Distinct words with probability."""
    audit: TargetError | None
    audit_top_k: TargetError | None


def inspect_cache(folder: Path) -> CacheReport:
    """Measure the cache in `folder`; memory does not grow with its rows.

    Raises:
        SourceError: there is no cache.
        CorruptedError: a file is missing, or its bytes are not those that were written.
        MismatchError: the cache has a later format.
    """
    cache = TeacherCache.open(folder)
    sums, histogram = torch.zeros(4, dtype=torch.float64), torch.zeros(STEPS, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(cache)), ROWS):
        figures = _figures(cache, rows)  # (4, positions)
        sums += figures.sum(1)
        # Float16 may sum to a little more than 1.
        histogram += torch.histc(figures[0].clamp(max=1), STEPS, 0, 1)
    positions = int(histogram.sum())
    head, tail, entropy, words = (sums / positions).tolist()
    audit = top_k = None
    if cache.facts.audit_rows:
        pairs = [_gaps(cache, row) for row in range(cache.facts.audit_rows)]
        audit = _target_error(torch.cat([ours for ours, _ in pairs]))
        top_k = _target_error(torch.cat([theirs for _, theirs in pairs]))
    return CacheReport(
        facts=cache.facts,
        rows=len(cache),
        positions=positions,
        bytes_per_token=cache.bytes_per_token,
        audit_bytes=cache.audit_bytes,
        head_mass=head,
        head_mass_low=_low_quantile(histogram),
        tail_mass=tail,
        entropy_nats=entropy,
        words_per_position=words,
        audit=audit,
        audit_top_k=top_k,
    )


def report_lines(report: CacheReport) -> Iterator[str]:
    """Yield the report as lines of a table: name, figure, unit."""
    facts = report.facts
    head = f"head {facts.head}, draws {facts.draws}, " if facts.kind != "dense" else ""
    yield f"{facts.kind} teacher cache: {head}temperature {facts.temperature:g}, seed {facts.seed}"
    yield _line("rows", f"{report.rows}", f"of {facts.sequence_length} tokens")
    yield _line("positions", f"{report.positions}", "without padding")
    yield _line("vocabulary", f"{facts.vocabulary}", "words or labels")
    yield _line("bytes a token", f"{report.bytes_per_token:.1f}", "in the shards")
    yield _line("audit", f"{report.audit_bytes}", f"bytes, {facts.audit_rows} rows, beside them")
    yield _line("hidden states", f"{facts.hidden_size}", "numbers a token")
    yield _line("head mass", f"{report.head_mass:.4f}", f"5 % below {report.head_mass_low:.4f}")
    yield _line("tail mass", f"{report.tail_mass:.4f}", "")
    yield _line("entropy", f"{report.entropy_nats:.4f}", "nats")
    yield _line("words a position", f"{report.words_per_position:.2f}", "distinct")
    if report.audit is None or report.audit_top_k is None:
        yield "no audit rows: capture with distillation.cache.audit_rows to measure the bias"
        return
    width = facts.head + facts.draws
    yield f"against the dense logits of {report.audit.positions} positions, in shares of the mass:"
    yield from _error_lines("these targets", report.audit)
    yield from _error_lines(f"top-{width}", report.audit_top_k)


def _error_lines(name: str, error: TargetError) -> Iterator[str]:
    bias = f"{error.likely_bias:+.6f}"
    yield _line(f"{name}: bias", bias, f"± {error.likely_bias_standard_error:.6f} to likely words")
    calibration = f"{error.calibration_error:.6f}"
    yield _line(
        f"{name}: calibration error", calibration, f"{error.calibration_noise:.6f} by chance alone"
    )


def _line(name: str, figure: str, unit: str) -> str:
    return f"  {name:<34} {figure:>12}  {unit}".rstrip()


def _figures(cache: TeacherCache, rows: Tensor) -> Tensor:
    """Return head mass, tail mass, entropy and distinct words (4, positions) of some rows."""
    targets = cache.targets(rows)
    match targets:
        case DenseTargets(logits):
            return _dense_figures(logits.flatten(0, -2), cache.facts)
        case SoftTargets(ids, probabilities):
            entropy = cache.entropy(rows)
            real = probabilities.sum(-1) > 0  # padding holds zeros
            kept, words = probabilities[real], ids[real]  # (positions, K + M)
            head = kept[:, : cache.facts.head].sum(-1)
            tail = kept[:, cache.facts.head :].sum(-1)
            # Words without probability count as the one before them in the sorted order.
            named = words.masked_fill(kept == 0, -1).sort(-1).values
            new = (named[:, 1:] != named[:, :-1]).sum(-1) + (named[:, 0] >= 0)
            return torch.stack([head, tail, entropy[real], new.float()]).double()


def _dense_figures(logits: Tensor, facts: CacheFacts) -> Tensor:
    real = logits[(logits != 0).any(-1)]  # padding holds zeros
    entropies = [
        torch.special.entr(torch.softmax(part.double() / facts.temperature, -1)).sum(-1)
        for part in torch.split(real, CHUNK)
    ]
    entropy = torch.cat(entropies) if entropies else torch.zeros(0, dtype=torch.float64)
    whole = torch.ones_like(entropy)
    return torch.stack([whole, torch.zeros_like(whole), entropy, facts.vocabulary * whole])


def _low_quantile(histogram: Tensor) -> float:
    """Return the 5 % quantile of values in [0, 1], to within one step of their histogram."""
    reached = histogram.cumsum(0) >= 0.05 * histogram.sum()
    return (int(reached.int().argmax()) + 1) / STEPS


def _gaps(cache: TeacherCache, row: int) -> tuple[Tensor, Tensor]:
    """Return the gaps of an audit row's targets, and those of top-k: (positions, 1 + bins) each.

    The first column is Σ (t − p) over the likely words, the others over each bin's words.
    """
    targets = cache.targets(torch.tensor([row]))
    assert isinstance(targets, SoftTargets), "a dense cache has no audit"
    real = targets.probabilities[0].sum(-1) > 0
    logits = cache.audit_logits(row)[real]
    ids, weights = targets.ids[0, real], targets.probabilities[0, real].double()
    width = min(cache.facts.head + cache.facts.draws, cache.facts.vocabulary)
    ours, theirs = [], []
    for start in range(0, len(logits), CHUNK):
        here = slice(start, start + CHUNK)
        p = torch.softmax(logits[here].double() / cache.facts.temperature, -1)
        likely = p.topk(width, -1)
        bins = torch.bucketize(p, torch.tensor(EDGES, dtype=torch.float64))
        top = torch.zeros_like(p).scatter_(
            -1, likely.indices, likely.values / likely.values.sum(-1, keepdim=True)
        )
        t = torch.zeros_like(p).scatter_add_(-1, ids[here], weights[here])
        ours.append(_summed(t - p, likely.indices, bins))
        theirs.append(_summed(top - p, likely.indices, bins))
    return torch.cat(ours), torch.cat(theirs)


def _summed(gap: Tensor, likely: Tensor, bins: Tensor) -> Tensor:
    in_bins = gap.new_zeros(len(gap), len(EDGES) + 1).scatter_add_(-1, bins, gap)
    return torch.cat([gap.gather(-1, likely).sum(-1, keepdim=True), in_bins], -1)


def _target_error(gaps: Tensor) -> TargetError:
    # Given the teacher, positions are drawn apart: their errors are independent.
    mean = gaps.mean(0)
    error = gaps.std(0) / len(gaps) ** 0.5 if len(gaps) > 1 else torch.full_like(mean, torch.inf)
    return TargetError(
        positions=len(gaps),
        likely_bias=mean[0].item(),
        likely_bias_standard_error=error[0].item(),
        bins=tuple(zip(mean[1:].tolist(), error[1:].tolist(), strict=True)),
    )
