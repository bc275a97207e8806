"""Rows of random tokens, as Examples, for tests that train."""

import torch

from stillroom.data.examples import Examples

TOKENIZER = "a" * 64


def token_rows(
    rows: int = 6, length: int = 12, *, seed: int = 0, vocab: int = 64, padding: int = 0
) -> Examples:
    """Return rows for a causal language model; odd rows end in `padding` tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[1::2, -padding:] = 0
    ids = ids * mask
    labels = torch.where(mask == 1, ids, -100)
    return Examples(ids, mask, labels, torch.arange(rows), TOKENIZER)


def labelled_rows(rows: int = 6, length: int = 12, *, seed: int = 0, vocab: int = 64) -> Examples:
    """Return rows of three classes; a row's class is its first token modulo 3."""
    plain = token_rows(rows, length, seed=seed, vocab=vocab)
    return Examples(
        plain.input_ids,
        plain.attention_mask,
        plain.input_ids[:, 0] % 3,
        plain.documents,
        TOKENIZER,
        ("a", "b", "c"),
    )
