"""Documents to rows of token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.data.conversations import NO_LOSS, encode_conversation
from stillroom.data.documents import Document, number_groups
from stillroom.data.examples import Examples
from stillroom.data.masking import mask_rows, mask_token, special_tokens
from stillroom.errors import DataError
from stillroom.progress import Progress, silent

BATCH_DOCUMENTS = 64

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Tokenised:
    """Rows, and what of the text is not in them."""

    examples: Examples
    truncated_tokens: int
    """Tokens beyond the ends of rows: cut tails, or the last part that fills no row."""
    rows_without_loss: int
    """Rows dropped because no token in them is learned from."""


def tokenise_causal(
    documents: list[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    pack: bool,
    tokenizer_hash: str,
    progress: Progress = silent,
) -> Tokenised:
    """Return the rows of a language model: each document's tokens and the end-of-text token.

    Plain texts are learned from whole, conversations in the assistant's turns only. `pack` joins
    all documents and cuts rows of `sequence_length` tokens, across which attention is not cut at
    the documents; without it a row is a document, cut at `sequence_length`, padded on the right.

    Raises:
        DataError: the tokenizer has no end-of-text token or no chat template, the text does not
            fill one row, or no row has a token to learn from.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "a tokenizer with an end-of-text token expected for a language model: this one has "
            "none; use a decoder's tokenizer, or the task masked_lm or sequence_classification"
        )
    encoded = list(_encode(documents, tokenizer, progress))
    owners = number_groups(documents)
    ids, mask, labels, rows_of = (
        _pack(encoded, owners, sequence_length)
        if pack
        else _pad(encoded, owners, sequence_length, padding_id(tokenizer))
    )
    total = sum(len(tokens) for tokens, _ in encoded)
    truncated = total - int(mask.sum())
    # The model predicts position t + 1 from t: the first position is never learned.
    learned = (labels[:, 1:] != NO_LOSS).any(dim=1)  # (rows,)
    if not learned.any():
        raise DataError(
            f"rows with a token to learn from expected: none of {len(learned)} rows of at most "
            f"{sequence_length} tokens reaches an answer; raise sequence_length"
        )
    examples = Examples(ids, mask, labels, rows_of, tokenizer_hash).take(learned)
    return Tokenised(examples, truncated, int((~learned).sum()))


def tokenise_masked(
    documents: list[Document],
    tokenizer: Any,
    sequence_length: int,
    *,
    pack: bool,
    masked_fraction: float,
    seed: int,
    tokenizer_hash: str,
    progress: Progress = silent,
) -> Tokenised:
    """Return the rows of a masked language model, with words hidden by `mask_rows`.

    Each row is closed by the tokenizer's special tokens, which count in `sequence_length`. `pack`
    joins all documents, what closes a row between them, and cuts rows of that length; without it a
    row is a document, cut at that length, padded on the right.

    Raises:
        DataError: the tokenizer has no mask token, the text does not fill one row, or no row holds
            a word that could be hidden.
    """
    mask_token(tokenizer)  # refused before the texts are tokenised, not after
    before, after = (np.array(part, dtype=np.int64) for part in special_tokens(tokenizer))
    inside = sequence_length - len(before) - len(after)
    texts = list(_plain(documents, tokenizer, progress))
    owners = number_groups(documents)
    if pack:
        closed = [np.concatenate([text, after]) for text in texts]
        body, _, _, rows_of = _pack([(text, text) for text in closed], owners, inside)
        ids = torch.cat([_column(before, len(body)), body, _column(after, len(body))], dim=1)
        mask = torch.ones_like(ids)
        truncated = sum(len(text) for text in closed) - body.numel()
    else:
        whole = [np.concatenate([before, text[:inside], after]) for text in texts]
        rows = [(row, row) for row in whole]
        ids, mask, _, rows_of = _pad(rows, owners, sequence_length, padding_id(tokenizer))
        truncated = sum(max(0, len(text) - inside) for text in texts)
    ids, labels = mask_rows(ids, mask, tokenizer, masked_fraction, seed)
    learned = (labels != NO_LOSS).any(dim=1)  # (rows,)
    if not learned.any():
        raise DataError(
            f"rows with a word to hide expected: {len(learned)} rows hold special tokens alone; "
            "give text in the words of the tokenizer"
        )
    examples = Examples(ids, mask, labels, rows_of, tokenizer_hash, masked=True).take(learned)
    return Tokenised(examples, truncated, int((~learned).sum()))


def tokenise_classification(
    documents: list[Document],
    tokenizer: Any,
    sequence_length: int,
    label_names: tuple[str, ...],
    *,
    tokenizer_hash: str,
    progress: Progress = silent,
) -> Tokenised:
    """Return one row a document with its label's position in `label_names`, padded on the right.

    Longer documents lose their end; the closing special token stays.

    Raises:
        DataError: a document has no label, or one that is not in `label_names`.
    """
    positions = {label: i for i, label in enumerate(label_names)}
    for document in documents:
        if document.label not in positions:
            raise DataError(
                f"a label among {', '.join(label_names)} expected for {document.title}: "
                f"{document.label} came; name the label column, or give training text with it"
            )
    sequences: list[Ids] = []
    total = 0
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        texts = [document.content for document in documents[start : start + BATCH_DOCUMENTS]]
        total += sum(len(row) for row in tokenizer(texts, verbose=False)["input_ids"])
        cut = tokenizer(texts, truncation=True, max_length=sequence_length)["input_ids"]
        sequences += [np.array(row, dtype=np.int64) for row in cut]
        progress(min(start + BATCH_DOCUMENTS, len(documents)), len(documents), "documents")
    encoded = [(row, row) for row in sequences]
    owners = number_groups(documents)
    ids, mask, _, rows_of = _pad(encoded, owners, sequence_length, padding_id(tokenizer))
    labels = torch.tensor([positions[d.label] for d in documents if d.label is not None])
    examples = Examples(ids, mask, labels, rows_of, tokenizer_hash, label_names)
    return Tokenised(examples, total - examples.tokens, 0)


def _plain(documents: list[Document], tokenizer: Any, progress: Progress) -> Iterator[Ids]:
    """Yield the token ids of each document, without special tokens around them."""
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        texts = [document.content for document in documents[start : start + BATCH_DOCUMENTS]]
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array(tokens, dtype=np.int64)
        progress(start + len(texts), len(documents), "documents")


def _column(tokens: Ids, rows: int) -> Tensor:
    return torch.from_numpy(tokens).expand(rows, len(tokens))


def _encode(
    documents: list[Document], tokenizer: Any, progress: Progress
) -> Iterator[tuple[Ids, Ids]]:
    """Yield (token ids, labels) for each document."""
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        texts = [document.text for document in batch if not document.messages]
        # Not verbose: a text longer than the model's window is cut later, and no cause to warn.
        plain = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
        for document in batch:
            if document.messages:
                tokens, labels = encode_conversation(document, tokenizer)
            else:
                tokens = _closed(next(plain), tokenizer.eos_token_id)
                labels = tokens
            yield np.array(tokens, dtype=np.int64), np.array(labels, dtype=np.int64)
        progress(start + len(batch), len(documents), "documents")


def _closed(tokens: list[int], end: int) -> list[int]:
    return tokens if tokens and tokens[-1] == end else [*tokens, end]


def _pack(
    encoded: list[tuple[Ids, Ids]], owners: list[int], length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = np.concatenate([tokens for tokens, _ in encoded])  # (tokens,)
    labels = np.concatenate([label for _, label in encoded])
    rows = len(ids) // length
    if rows == 0:
        raise DataError(
            f"text shorter than one sequence: {length} tokens needed, {len(ids)} came; "
            f"give more text, or set sequence_length to {len(ids)} or less"
        )
    owner = np.repeat(np.array(owners), [len(tokens) for tokens, _ in encoded])
    kept = torch.from_numpy(ids[: rows * length]).reshape(rows, length)
    learned = torch.from_numpy(labels[: rows * length]).reshape(rows, length)
    firsts = torch.from_numpy(owner[: rows * length : length].astype(np.int64))  # (rows,)
    return kept, torch.ones_like(kept), learned, firsts


def _pad(
    encoded: list[tuple[Ids, Ids]], owners: list[int], length: int, padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    longest = min(length, max(len(tokens) for tokens, _ in encoded))
    shape = (len(encoded), longest)
    ids = torch.full(shape, padding)  # (rows, longest) int64
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LOSS)
    for row, (tokens, label) in enumerate(encoded):
        size = min(longest, len(tokens))
        ids[row, :size] = torch.from_numpy(tokens[:size])
        mask[row, :size] = 1
        labels[row, :size] = torch.from_numpy(label[:size])
    return ids, mask, labels, torch.tensor(owners)


def padding_id(tokenizer: Any) -> int:
    """Return what rows are padded with: the padding, or else what ends or parts texts, or 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    return 0
