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


def masked_rows(
    rows: int = 6, length: int = 12, *, seed: int = 0, vocab: int = 64, padding: int = 0
) -> Examples:
    """Return rows for a masked language model, a third of their tokens hidden by token 3."""
    plain = token_rows(rows, length, seed=seed, vocab=vocab, padding=padding)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.rand(plain.input_ids.shape, generator=generator) < 1 / 3
    hidden[:, 0] = True
    hidden &= plain.attention_mask == 1
    return Examples(
        plain.input_ids.masked_fill(hidden, 3),
        plain.attention_mask,
        plain.input_ids.masked_fill(~hidden, -100),
        plain.documents,
        TOKENIZER,
        masked=True,
    )


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
