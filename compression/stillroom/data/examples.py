"""Rows of tokens in memory and on disk."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import CorruptedError, MismatchError, SourceError

SIDECAR = "examples.json"
ROWS = "rows"


@dataclass(frozen=True)
class Examples:
    """Tokenised rows.

    input_ids: (rows, length) int64. attention_mask: (rows, length) int64, 1 = real token.
    labels: for language models (rows, length) int64, not shifted, position t holds token t, -100
    where there is no loss; for classification (rows,) int64, positions in `label_names`.
    documents: (rows,) int64, the document a row comes from, documents of one family counting as
    one; for packed rows that of the first token. Standard errors are clustered by it.
    masked: the rows are a masked language model's, whose output t answers for the label at t; a
    causal one's answers for the label at t + 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    documents: Tensor
    tokenizer_hash: str
    label_names: tuple[str, ...] = ()
    masked: bool = False

    def __post_init__(self) -> None:
        rows, length = self.input_ids.shape
        if self.masked and self.label_names:
            raise MismatchError("masked rows have words for labels: no label_names expected")
        labels = (rows,) if self.label_names else (rows, length)
        expected = {"attention_mask": (rows, length), "labels": labels, "documents": (rows,)}
        for name, shape in expected.items():
            came = tuple(getattr(self, name).shape)
            if came != shape:
                raise MismatchError(f"{name} of shape {shape} expected, {came} came")
        for name in ("input_ids", *expected):
            dtype = getattr(self, name).dtype
            if dtype != torch.int64:
                raise MismatchError(f"{name} of type int64 expected, {dtype} came")

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Return the number of real tokens, without padding."""
        return int(self.attention_mask.sum())

    def take(self, rows: Tensor | slice) -> "Examples":
        """Return some rows: a slice, a tensor of positions (chosen,) or a boolean mask (rows,)."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            labels=self.labels[rows],
            documents=self.documents[rows],
        )

    def without_shared_padding(self) -> "Examples":
        """Return the rows without the columns at their end that are padding in all of them.

        What stays is a multiple of eight columns where there are so many: kernels are made for
        that, and sum in an order that does not depend on the number of threads.
        """
        real = self.attention_mask.any(0).nonzero()
        longest = max(int(real[-1]) + 1 if len(real) else 0, 1)
        length = -(-longest // 8) * 8
        return replace(
            self,
            input_ids=self.input_ids[:, :length],
            attention_mask=self.attention_mask[:, :length],
            labels=self.labels if self.label_names else self.labels[:, :length],
        )

    def row_hashes(self) -> list[str]:
        """Return the SHA-256 of each row's token ids and mask, as little-endian int64."""
        both = torch.cat([self.input_ids, self.attention_mask], dim=1)  # (rows, 2 * length)
        return [sha256(row.astype("<i8").tobytes()).hexdigest() for row in both.numpy()]


def save_examples(examples: Examples, folder: Path) -> None:
    """Write rows as Arrow below `folder`, with a JSON file for what is the same for all rows.

    The same rows give the same bytes.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars
    from datasets.utils import are_progress_bars_disabled

    hashes = sha256("".join(examples.row_hashes()).encode()).hexdigest()
    # The library's own fingerprint is drawn from the time: the files would differ.
    dataset = Dataset(_table(examples), fingerprint=hashes[:16])
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        dataset.save_to_disk(str(folder / ROWS))
    finally:
        if not quiet:
            enable_progress_bars()
    facts = {
        "rows": len(examples),
        "length": examples.input_ids.shape[1],
        "rows_sha256": hashes,
        "tokenizer_hash": examples.tokenizer_hash,
        "label_names": list(examples.label_names),
    }
    # Only where it is so: rows of other tasks keep the bytes that they have had before.
    facts |= {"masked": True} if examples.masked else {}
    (folder / SIDECAR).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_examples(folder: Path, expected_tokenizer_hash: str | None = None) -> Examples:
    """Read rows that `save_examples` wrote, and verify them.

    Raises:
        SourceError: there are no rows in the folder.
        CorruptedError: the rows are not those that were saved.
        MismatchError: they were made with another tokenizer than expected.
    """
    if not (folder / SIDECAR).is_file():
        raise SourceError(f"saved rows expected in {folder}: {SIDECAR} is not there")
    try:
        facts = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
        expected = facts["tokenizer_hash"]
        examples = _load(folder, facts)
    except (OSError, ValueError, KeyError, MismatchError) as error:
        raise CorruptedError(
            f"saved rows expected in {folder}: {error}; make them again"
        ) from error
    if expected_tokenizer_hash is not None and expected_tokenizer_hash != expected:
        raise MismatchError(
            f"tokenizer differs: the rows were made with {expected[:12]}, the model has "
            f"{expected_tokenizer_hash[:12]}; prepare the data again with the model's tokenizer"
        )
    hashes = sha256("".join(examples.row_hashes()).encode()).hexdigest()
    if hashes != facts["rows_sha256"]:
        raise CorruptedError(f"the rows in {folder} are not those that were saved; make them again")
    return examples


def _table(examples: Examples) -> Any:
    import pyarrow as pa

    def column(tensor: Tensor) -> Any:
        values = pa.array(tensor.reshape(-1).numpy())
        if tensor.dim() == 1:
            return values
        return pa.FixedSizeListArray.from_arrays(values, tensor.shape[1])

    names = ("input_ids", "attention_mask", "labels", "documents")
    return pa.table({name: column(getattr(examples, name)) for name in names})


def _load(folder: Path, facts: dict[str, Any]) -> Examples:
    from datasets import load_from_disk

    rows, length = int(facts["rows"]), int(facts["length"])
    names = tuple(facts["label_names"])
    # The library writes a dataset without rows and cannot read it.
    table = load_from_disk(str(folder / ROWS)).data if rows else None

    def tensor(name: str, *shape: int) -> Tensor:
        if table is None:
            return torch.zeros(shape, dtype=torch.int64)
        column = table.column(name).combine_chunks()
        values = column.flatten() if len(shape) > 1 else column
        return torch.from_numpy(values.to_numpy().copy()).reshape(shape)

    return Examples(
        input_ids=tensor("input_ids", rows, length),
        attention_mask=tensor("attention_mask", rows, length),
        labels=tensor("labels", rows) if names else tensor("labels", rows, length),
        documents=tensor("documents", rows),
        tokenizer_hash=facts["tokenizer_hash"],
        label_names=names,
        masked=bool(facts.get("masked", False)),
    )
