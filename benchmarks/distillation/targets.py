"""How many words to keep and how many to draw: the targets' spread in as many bytes a token."""

import torch

from benchmarks.claims import at_most, write_measure
from benchmarks.distillation.places import measure_path
from benchmarks.distillation.work import load_teacher, train_rows
from benchmarks.text import text_source
from stillroom.distillation.cache_files import sparse_bytes
from stillroom.distillation.sampling import sparsify
from stillroom.distillation.teacher_cache import CacheOptions

ROWS = 16
EVERY = 4  # positions of a row
REPEATS = 16
HEADS = range(7)


def measure_targets() -> None:
    """Compare the squared distance of the targets from the teacher's distribution, in the mean."""
    default = CacheOptions()
    words: int = load_teacher().config.vocab_size
    budget = sparse_bytes(default.head, default.draws, words)
    pairs = pairs_within(budget, words)
    spreads = dict.fromkeys(pairs, 0.0)
    count = 0
    generator = torch.Generator().manual_seed(0)
    for row in train_rows().input_ids[:ROWS]:
        with torch.no_grad():
            logits = load_teacher()(input_ids=row[None], use_cache=False).logits[0, ::EVERY]
        probabilities = torch.softmax(logits, -1)
        count += len(probabilities)
        for pair in pairs:
            spreads[pair] += _spread(probabilities, *pair, generator)
    ours, least = spreads[default.head, default.draws], min(spreads.values())
    rows = [
        {
            "head": head,
            "draws": draws,
            "bytes_per_token": sparse_bytes(head, draws, words),
            "squared_error": spread / count,
        }
        for (head, draws), spread in spreads.items()
    ]
    claims = [at_most("squared error of the default's targets over the least", 1.05, ours / least)]
    write_measure(measure_path("targets"), claims, text=text_source(), bytes=budget, rows=rows)


def pairs_within(budget: int, words: int) -> list[tuple[int, int]]:
    """Return, for each head, the head and as many draws as its targets have room for.

    `budget` is in bytes a token, of a vocabulary of `words`.
    """
    pairs = []
    for head in HEADS:
        draws = 1
        while sparse_bytes(head, draws + 1, words) <= budget:
            draws += 1
        pairs.append((head, draws))
    return pairs


def _spread(
    probabilities: torch.Tensor, head: int, draws: int, generator: torch.Generator
) -> float:
    """Return the sum over positions (positions, vocab) of Σ_i (t_i − p_i)², a mean of draws."""
    total = 0.0
    for _ in range(REPEATS):
        shape = (len(probabilities), draws)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        kept = sparsify(probabilities, head, uniforms)
        each = (kept.tail_mass / draws).unsqueeze(-1).expand(-1, draws)
        targets = torch.zeros_like(probabilities)
        targets.scatter_add_(-1, kept.head_ids, kept.head_probabilities)
        targets.scatter_add_(-1, kept.tail_ids, each)
        total += (targets - probabilities).square().sum().item()
    return total / REPEATS
