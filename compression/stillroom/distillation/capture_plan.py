"""What is to be asked of a teacher, and the pieces in which it can be asked."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stillroom.data.examples import Examples
from stillroom.distillation.cache_files import (
    AUDIT,
    CacheFacts,
    CacheKind,
    HiddenStates,
    identity,
    shard_name,
)
from stillroom.errors import DataError, MismatchError, RecipeError


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of the teacher's outputs, and in which portions they are computed.

    `head` words are kept exactly and `draws` are drawn from the rest ("sampled"); "top_k" keeps
    the head alone, renormalised, and is biased; "dense" keeps every logit. Of the first
    `audit_rows` rows every logit is kept beside them. `hidden_states` "last" keeps the teacher's
    last hidden states too.
    """

    kind: CacheKind = "sampled"
    head: int = 2
    draws: int = 16
    temperature: float = 1.0
    rows_per_shard: int = 16
    batch_rows: int = 4
    seed: int = 0
    audit_rows: int = 0
    hidden_states: HiddenStates = "none"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(
                f"temperature must be above 0, {self.temperature} came; 1 leaves logits as they are"
            )
        if (self.kind == "top_k" and self.head < 1) or (self.kind == "sampled" and self.draws < 1):
            raise RecipeError(
                "a sampled teacher cache needs draws >= 1, a top_k one head >= 1: "
                f"head {self.head} and draws {self.draws} came"
            )


@dataclass(frozen=True)
class CapturePlan:
    """Which rows are asked, of which teacher, and what is kept.

    `tokenizer_hash` is the teacher's own, `fingerprint` names the teacher. The plan is cut into
    pieces that do not depend on one another, so that any process can make any of them.

    Raises:
        DataError: there is no row.
        MismatchError: the rows were made with another tokenizer.
    """

    examples: Examples
    options: CacheOptions
    tokenizer_hash: str
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if len(self.examples) == 0:
            raise DataError(
                "teacher cache: expected at least one row of tokens, got none; add text"
            )
        if self.tokenizer_hash != self.examples.tokenizer_hash:
            raise MismatchError(
                f"the rows were made with tokenizer {self.examples.tokenizer_hash[:12]}, the "
                f"teacher has {self.tokenizer_hash[:12]}; prepare the data again with the "
                "teacher's tokenizer"
            )

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The hash of each row."""
        return tuple(self.examples.row_hashes())

    @property
    def kind(self) -> CacheKind:
        """What is kept; a classifier's few logits are kept whole, whatever was asked."""
        return "dense" if self.examples.label_names else self.options.kind

    @property
    def audit_rows(self) -> int:
        """How many rows are kept dense beside the targets; a dense cache is its own audit."""
        return 0 if self.kind == "dense" else min(self.options.audit_rows, len(self.examples))

    @cached_property
    def pieces(self) -> dict[str, slice]:
        """Each piece by its name, with its rows: the audit where there is one, then the shards."""
        size, count = self.options.rows_per_shard, len(self.examples)
        pieces = {AUDIT: slice(0, self.audit_rows)} if self.audit_rows else {}
        for number, start in enumerate(range(0, count, size)):
            pieces[shard_name(number)] = slice(start, min(start + size, count))
        return pieces

    def facts(self, vocabulary: int, hidden_size: int) -> CacheFacts:
        """Return what the cache's targets belong to, once the teacher's widths are known."""
        options = self.options
        return CacheFacts(
            kind=self.kind,
            head=0 if self.kind == "dense" else min(options.head, vocabulary),
            draws=options.draws if self.kind == "sampled" else 0,
            temperature=options.temperature,
            seed=options.seed,
            rows_per_shard=options.rows_per_shard,
            vocabulary=vocabulary,
            sequence_length=self.examples.input_ids.shape[1],
            tokenizer_hash=self.examples.tokenizer_hash,
            teacher=self.fingerprint,
            row_hashes=self.hashes,
            audit_rows=self.audit_rows,
            hidden_states=options.hidden_states,
            hidden_size=hidden_size,
        )

    def seal(self, piece: str, facts: CacheFacts) -> dict[str, Any]:
        """Return, as JSON values, what two writings of a piece must share to be the same."""
        rows = list(self.hashes[self.pieces[piece]])
        return identity(facts) | {"rows": rows, "batch_rows": self.options.batch_rows}
