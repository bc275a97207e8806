"""Words hidden from a masked language model, which it has to name (BERT, 1810.04805)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillroom.data.conversations import NO_LOSS
from stillroom.errors import DataError
from stillroom.training.options import derived_seed

# BERT, appendix A.1: of the chosen positions so many become the mask, and so many a random word.
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1


class SpecialTokens(NamedTuple):
    """What a tokenizer puts before and after a text, such as [CLS] and [SEP]."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens that `tokenizer` puts around one text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first = special.index(0)
    last = len(ids) - special[::-1].index(0)
    return SpecialTokens(tuple(ids[:first]), tuple(ids[last:]))


def mask_token(tokenizer: Any) -> int:
    """Return the id of the token that stands for a hidden word.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "a tokenizer with a mask token expected for a masked language model: this one has "
            "none; use an encoder's tokenizer, or the task causal_lm"
        )
    return int(tokenizer.mask_token_id)


def mask_rows(
    ids: Tensor, attention_mask: Tensor, tokenizer: Any, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return rows with some words hidden, and labels: those words, -100 at all other positions.

    Of each row's real tokens that are not special `fraction` are chosen, one at least. Of the
    chosen ones 80 % become the mask token, 10 % a word drawn from all that are not special, 10 %
    stay. What becomes of a row depends on its own tokens, its number and `seed` alone.

    Args:
        ids: (rows, length) int64; left as they are.
        attention_mask: (rows, length), 1 = real token.
        tokenizer: says which tokens are special, and which one is the mask.
        fraction: share of the positions to choose, above 0 and below 1.
        seed: every choice follows from it.

    Raises:
        DataError: the tokenizer has no mask token.
    """
    mask = mask_token(tokenizer)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    words = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(special.tolist())))
    open_to_choice = attention_mask.bool() & ~torch.isin(ids, special)
    masked, labels = ids.clone(), torch.full_like(ids, NO_LOSS)
    for row in range(len(ids)):
        generator = torch.Generator().manual_seed(derived_seed(seed, "mask", row))
        positions = open_to_choice[row].nonzero()[:, 0]
        count = max(1, round(fraction * len(positions)))
        chosen = positions[torch.randperm(len(positions), generator=generator)[:count]]
        fates = torch.rand(len(chosen), generator=generator)
        drawn = words[torch.randint(len(words), (len(chosen),), generator=generator)]
        labels[row, chosen] = ids[row, chosen]
        masked[row, chosen[fates < MASKED_SHARE]] = mask
        random = (fates >= MASKED_SHARE) & (fates < MASKED_SHARE + RANDOM_SHARE)
        masked[row, chosen[random]] = drawn[random]
    return masked, labels
