"""The teacher cache on disk: its layout, byte by byte, and its reader.

A cache is a folder of `cache.json`, `shard-00000.safetensors`, `shard-00001.safetensors`, … and,
where one was asked for, `audit.safetensors`. A shard holds `rows_per_shard` consecutive rows of the
examples (the last one fewer). A safetensors file is 8 bytes (little-endian length n of the header),
n bytes of JSON (name, type, shape and offsets of each tensor), then the tensors, little-endian and
row-major, which is why a reader can map the file and touch only the rows it needs. L is the
sequence length, K the head entries, M the draws, H the width of the hidden states. Position t is
the teacher's distribution at position t, at the capture temperature: that of token t + 1 for a
causal language model, of token t for a masked one.

  shard-*.safetensors

    sampled, top_k
      head_words          (rows, L, bytes) uint8 the most likely words, sorted by id
      head_probabilities  (rows, L, K) float16   of each, in that order; sampled: rounded up or down
                                                 at random, mean kept; top_k: renormalised to sum
                                                 to 1
      tail_words          (rows, L, bytes) uint8 drawn words, sorted by id, repeats allowed; each
                                                 stands for tail_mass / M
      tail_mass           (rows, L)    float16   1 less the head's exact sum, rounded as the head
      entropy             (rows, L)    float16   of the whole distribution, in nats; rounded up or
                                                 down at random (float32 before version 3)
    dense
      logits              (rows, L, vocab) float32, not divided by the temperature;
                                           classification: (rows, labels) float32
    with hidden_states "last", of each kind
      hidden              (rows, L, H)     float16   the teacher's last hidden state, transformers'
                                                     `hidden_states[-1]`: after the final norm
                                                     where the model has one, before the head
  audit.safetensors (audit_rows > 0; a dense cache is its own audit and has none)
      logits              (audit_rows, L, vocab) float32   of the first rows, as in a dense cache

The words are in Elias-Fano codes (`stillroom.distillation.elias_fano`): K or M ids of a vocabulary
take the same number of bytes at every position. Those of the head are absent where K is 0, with
their probabilities; those of the tail where M is 0, with its mass. Before version 4 the ids stood
there plainly, head_ids (rows, L, K), the likeliest first, and tail_ids (rows, L, M): uint16, or
int32 above 65,536 words.

At the default K = 2 and M = 16 and SmolLM2's 49,152 words a token takes, in bytes, 4 + 2·2 of the
head, 27 + 2 of the tail and 2 of the entropy: 39. Without the code it would be 44; with Qwen's
151,936 words it is 5 + 2·2 + 31 + 2 + 2 = 44, and would be 80. Hidden states add 2·H. A row of
audit takes 4·L·vocab bytes: of 512 tokens and 49,152 words 101 MB, as much as 2.6 million tokens
of the shards. Padding positions hold word 0 and zeros.

`cache.json` holds what the targets belong to (fields of `CacheFacts`) and each file's SHA-256.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stillroom.checkpoint import sha256_of
from stillroom.data.examples import Examples
from stillroom.distillation import elias_fano
from stillroom.distillation.losses import DenseTargets, SoftTargets
from stillroom.errors import CorruptedError, MismatchError, SourceError

CacheKind = Literal["sampled", "top_k", "dense"]
HiddenStates = Literal["none", "last"]
FACTS = "cache.json"
AUDIT = "audit"
FORMAT_VERSION = 4
CODED_SINCE = 4


@dataclass(frozen=True)
class CacheFacts:
    """What the targets of a cache belong to: they are of use to nothing else.

    `row_hashes` are those of the examples, one a row, in order. `teacher` names the model that was
    asked, `vocabulary` counts its words (classification: its labels), `hidden_size` is the width
    of its hidden states, 0 where none are kept. Version 1 knew neither audit nor hidden states.
    """

    kind: CacheKind
    head: int
    draws: int
    temperature: float
    seed: int
    rows_per_shard: int
    vocabulary: int
    sequence_length: int
    tokenizer_hash: str
    teacher: str
    row_hashes: tuple[str, ...]
    audit_rows: int = 0
    hidden_states: HiddenStates = "none"
    hidden_size: int = 0
    format_version: int = FORMAT_VERSION


class TeacherCache:
    """Read the targets of a cache, row by row, out of mapped files.

    Memory does not grow with the cache: only the rows asked for are copied.
    """

    def __init__(self, folder: Path, facts: CacheFacts) -> None:
        self.folder = folder
        self.facts = facts
        self._files: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """Return the cache in `folder`, its shards verified.

        Raises:
            SourceError: there is no cache.
            CorruptedError: a shard is missing, or its bytes are not those that were written.
            MismatchError: the cache has a later format.
        """
        try:
            content = json.loads((folder / FACTS).read_text())
        except FileNotFoundError:
            raise SourceError(
                f"{folder} holds no teacher cache: expected {FACTS}; capture one first"
            ) from None
        except ValueError as error:
            raise CorruptedError(f"{folder / FACTS} is no JSON: {error}; capture again") from error
        if content["format_version"] > FORMAT_VERSION:
            raise MismatchError(
                f"{folder} has format {content['format_version']} of the teacher cache, at most "
                f"{FORMAT_VERSION} was expected: read it with a newer stillroom, or capture again"
            )
        shards: dict[str, str] = content.pop("shards")
        for name, expected in shards.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise CorruptedError(
                    f"{folder / name} is missing or has changed since it was written; "
                    "capture the cache again"
                )
        content["row_hashes"] = tuple(content["row_hashes"])
        return cls(folder, CacheFacts(**content))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.facts.row_hashes)

    def check(self, examples: Examples, temperature: float) -> None:
        """Refuse examples or a temperature that the cache was not captured for.

        Raises:
            MismatchError: naming what differs: tokenizer, length, rows or temperature.
        """
        facts = self.facts
        length = examples.input_ids.shape[1]
        pairs = {
            "tokenizer": (facts.tokenizer_hash[:12], examples.tokenizer_hash[:12]),
            "sequence length": (facts.sequence_length, length),
            "temperature": (facts.temperature, temperature),
            "number of rows": (len(self), len(examples)),
        }
        for what, (cached, asked) in pairs.items():
            if cached != asked:
                raise MismatchError(
                    f"the teacher cache has another {what}: it was captured with {cached}, "
                    f"{asked} came; capture the teacher again on these rows"
                )
        for row, (cached, asked) in enumerate(
            zip(facts.row_hashes, examples.row_hashes(), strict=True)
        ):
            if cached != asked:
                raise MismatchError(
                    f"the teacher cache has other rows: row {row} holds other tokens than in the "
                    "examples, which were packed, ordered or filtered otherwise; "
                    "capture the teacher again on these rows"
                )

    def targets(self, rows: Tensor) -> SoftTargets | DenseTargets:
        """Return the teacher's targets of some rows (batch,), in that order."""
        if self.facts.kind == "dense":
            return DenseTargets(self._tensor("logits", rows).float())
        shape = (len(rows), self.facts.sequence_length, 0)
        ids = [torch.empty(shape, dtype=torch.long)]
        probabilities = [torch.empty(shape)]
        if self.facts.head:
            ids.append(self._words("head", self.facts.head, rows))
            probabilities.append(self._tensor("head_probabilities", rows).float())
        if self.facts.draws:
            drawn = self._words("tail", self.facts.draws, rows)
            each = self._tensor("tail_mass", rows).float() / self.facts.draws
            ids.append(drawn)
            probabilities.append(each.unsqueeze(-1).expand(drawn.shape))
        masses = torch.cat(probabilities, -1)
        # Drawn targets stand for the whole distribution, the top k for themselves alone.
        alone = self.facts.kind == "top_k"
        entropy = torch.special.entr(masses).sum(-1) if alone else self.entropy(rows)
        return SoftTargets(torch.cat(ids, -1), masses, entropy)

    def entropy(self, rows: Tensor) -> Tensor:
        """Return the entropy (batch, length) of the teacher's whole distributions, in nats."""
        return self._tensor("entropy", rows).float()

    def hidden(self, rows: Tensor) -> Tensor:
        """Return the teacher's last hidden states (batch, length, hidden) float32 of some rows.

        Raises:
            MismatchError: the cache holds none.
        """
        if self.facts.hidden_states == "none":
            raise MismatchError(
                f"{self.folder} holds no hidden states; capture the teacher again with "
                'hidden_states: "last"'
            )
        return self._tensor("hidden", rows).float()

    def audit_logits(self, row: int) -> Tensor:
        """Return every logit (length, vocab) float32 of one of the first `audit_rows` rows."""
        logits = self._open(AUDIT).get_slice("logits")[row : row + 1]
        return torch.from_numpy(logits)[0]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all shards over all positions of all rows; the audit is counted apart."""
        size = sum(path.stat().st_size for path in self.folder.glob(tensor_file("shard-*")))
        return size / (len(self) * self.facts.sequence_length)

    @property
    def audit_bytes(self) -> int:
        """Bytes of the audit; 0 where there is none."""
        return (self.folder / tensor_file(AUDIT)).stat().st_size if self.facts.audit_rows else 0

    def _words(self, part: str, count: int, rows: Tensor) -> Tensor:
        """Return the ids (batch, length, count) int64 of the head's or the tail's words."""
        if self.facts.format_version < CODED_SINCE:
            return self._tensor(f"{part}_ids", rows).long()
        codes = self._tensor(f"{part}_words", rows).numpy()
        return torch.from_numpy(elias_fano.decode(codes, count, self.facts.vocabulary))

    def _tensor(self, name: str, rows: Tensor) -> Tensor:
        parts = []
        for row in rows.tolist():
            shard, offset = divmod(row, self.facts.rows_per_shard)
            parts.append(self._open(shard_name(shard)).get_slice(name)[offset : offset + 1])
        values = np.concatenate(parts)
        # torch can hold uint16 but index with nothing of it.
        return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)

    def _open(self, piece: str) -> Any:
        if piece not in self._files:
            path = self.folder / tensor_file(piece)
            try:
                self._files[piece] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise CorruptedError(f"{path} cannot be read: {error}; capture again") from error
        return self._files[piece]


def shard_name(number: int) -> str:
    """Return the name of a shard as a checkpoint piece: shard-00003."""
    return f"shard-{number:05d}"


def tensor_file(piece: str) -> str:
    """Return the file name of a piece: shard-00003.safetensors, audit.safetensors."""
    return f"{piece}.safetensors"


def sparse_bytes(head: int, draws: int, vocabulary: int) -> int:
    """Return the bytes that the targets of one token take, headers of files apart."""
    kept = elias_fano.code_bytes(head, vocabulary) + 2 * head
    drawn = elias_fano.code_bytes(draws, vocabulary) + 2 if draws else 0
    return kept + drawn + 2  # the entropy


def write_facts(folder: Path, facts: CacheFacts, pieces: list[str]) -> None:
    """Write `cache.json` beside its pieces, last: until then the cache does not exist."""
    names = [tensor_file(piece) for piece in pieces]
    hashes = {name: sha256_of(folder / name) for name in names}
    (folder / FACTS).write_text(json.dumps(asdict(facts) | {"shards": hashes}, sort_keys=True))


def identity(facts: CacheFacts) -> dict[str, Any]:
    """Return the facts without the row hashes, as JSON values, to compare two captures."""
    return {
        entry.name: getattr(facts, entry.name)
        for entry in fields(facts)
        if entry.name != "row_hashes"
    }
