"""What to keep of a teacher's distribution: an exact head and a drawn tail, without bias.

Plain top-k targets are biased: what they leave out is taken from the student too (Sparse Logit
Sampling, 2503.16870). Here the K most likely words are kept with their probabilities p_i, and M
words are drawn from the rest, renormalised by its mass m. The target is t_i = p_i on the head and
t_i = m · c_i / M on a word drawn c_i times, so E[t_i] = p_i for every word: a loss that is linear
in the target has an unbiased gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseDistribution:
    """Head and tail of the distributions at some positions.

    head_ids int64 and head_probabilities float32 (positions, K), tail_ids int64 (positions, M),
    each standing for tail_mass / M; tail_mass and entropy float32 (positions,).
    """

    head_ids: Tensor
    head_probabilities: Tensor
    tail_ids: Tensor
    tail_mass: Tensor
    entropy: Tensor


def joined(parts: Sequence[SparseDistribution]) -> SparseDistribution:
    """Return the distributions of all parts' positions, one after another."""
    names = [field.name for field in fields(SparseDistribution)]
    return SparseDistribution(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    )


def sparsify(probabilities: Tensor, head: int, uniforms: Tensor) -> SparseDistribution:
    """Return the `head` most likely words and one tail word for each number of `uniforms`.

    `probabilities` (positions, vocab) float32, rows summing to 1; `uniforms` (positions, M) in
    [0, 1). The entropy is that of the whole distribution, in nats.
    """
    entropy = torch.special.entr(probabilities).sum(-1)
    kept, ids = probabilities.topk(head, dim=-1)  # (positions, K)
    # Summing 10⁵ words in float32 loses the last ones, and a draw near 1 would miss them.
    cumulative = probabilities.scatter(-1, ids, 0.0).cumsum(-1, dtype=torch.float64)
    tail_mass = cumulative[:, -1:]
    drawn = draw(cumulative, uniforms)
    return SparseDistribution(ids, kept, drawn, tail_mass[:, 0].float(), entropy)


def draw(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Return one index of the last dimension for each uniform number, by inversion.

    `cumulative` (positions, vocab) float64 are running sums of weights, not necessarily up to 1;
    `uniforms` (positions, M) in [0, 1). Draw j falls into the j-th of M equal parts of the mass:
    each index is expected M times its share, as with independent draws, and no linear function of
    the counts varies more (stratified sampling). A position without mass gives index 0.
    """
    draws = uniforms.shape[-1]
    strata = torch.arange(draws, dtype=torch.float64, device=uniforms.device)
    total = cumulative[:, -1:].contiguous()  # (positions, 1)
    points = (strata + uniforms) / max(draws, 1) * total  # (positions, M)
    found = torch.searchsorted(cumulative, points, right=True)
    # Rounding can push a point onto the total, behind the last word that has any mass.
    last = torch.searchsorted(cumulative, total)
    return torch.where(total > 0, torch.minimum(found, last), 0)


def round_to_half(values: Tensor, uniforms: Tensor) -> Tensor:
    """Return non-negative float32 `values` as float16, rounded up or down so that the mean is kept.

    A value at the share f between two neighbours becomes the upper one with probability f;
    `uniforms` in [0, 1) decide. Rounding to nearest would shift every head probability for good.
    """
    nearest = values.half()
    # The bits of non-negative floats count up with their value.
    bits = nearest.view(torch.int16)
    lower = (bits - (nearest.float() > values).to(torch.int16)).view(torch.float16).float()
    upper = (lower.half().view(torch.int16) + 1).view(torch.float16).float()
    share = (values - lower) / (upper - lower)
    return torch.where(uniforms < share, upper, lower).half()
