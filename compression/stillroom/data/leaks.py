"""Evaluation text that stands in the training text, found and taken out.

Runs of n words are compared (Brown et al. 2020, 2005.14165, appendix C: n = 13), as 64-bit hashes.
Words are runs of letters and digits with folded case and the marks that belong to them, such as the
vowels of Hindi; a Chinese, Japanese or Korean character is a word of its own. Of other scripts that
part no words (Thai, Khmer) a run of letters between marks is one.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from stillroom.data.documents import Document, paragraphs
from stillroom.errors import DataError

Hashes = NDArray[np.uint64]
Encode = Callable[[str], Hashes]

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# No letters to `\w`: accents, the points of Hebrew and Arabic, all signs of India's scripts but
# their full stops, and what joins or parts letters within a word.
_MARKS = (
    r"\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    r"\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0900-\u0963\u0971-\u0df3\u200c\u200d"
)
WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[{_MARKS}]+[^\W{_CJK}]*)*")
# A run in more evaluation families than this is boilerplate: a licence, an instruction.
BOILERPLATE_FAMILIES = 10


@dataclass(frozen=True)
class LeakReport:
    """How much of each evaluation document stands in the training text."""

    ngram: int
    share: float
    shares: tuple[float, ...]
    """One number an evaluation document: the share of its runs of `ngram` words found in training;
    for a document of fewer words 1 if a training document has the same words, else 0."""
    boilerplate: int
    """Runs not counted because more than 10 independent evaluation documents hold them."""

    @property
    def leaked(self) -> tuple[int, ...]:
        """Return the positions of the evaluation documents with more than the allowed share."""
        return tuple(i for i, share in enumerate(self.shares) if share > self.share)


@dataclass(frozen=True)
class LeakRemoval:
    """What was taken out of the training text."""

    evaluation_documents: int
    documents: int
    paragraphs: int
    characters: int


def find_leaks(
    train: list[Document], evaluation: list[Document], *, ngram: int = 13, share: float = 0.0
) -> LeakReport:
    """Return how much of each evaluation document stands in the training documents."""
    return _report(train, _Index(evaluation, ngram), share)


def remove_leaks(
    train: list[Document], evaluation: list[Document], *, ngram: int = 13, share: float = 0.0
) -> tuple[list[Document], LeakRemoval]:
    """Return the training documents without what is found in leaked evaluation documents.

    Plain texts lose each paragraph that a found run touches; conversations and labelled texts are
    dropped whole. Afterwards no run of a leaked evaluation document (boilerplate apart) is left.

    Raises:
        DataError: nothing is left to learn from.
    """
    index = _Index(evaluation, ngram)
    report = _report(train, index, share)
    runs, texts = index.of(report.leaked)
    kept: list[Document] = []
    lost_paragraphs = 0
    for document in train:
        cleaned, lost = _clean(document, runs, texts, index)
        lost_paragraphs += lost
        if cleaned is not None:
            kept.append(cleaned)
    if not kept:
        raise DataError(
            f"training text apart from the evaluation text expected: all {len(train)} training "
            f"documents hold runs of {ngram} words of it; give other text to measure on"
        )
    characters = sum(len(d.content) for d in train) - sum(len(d.content) for d in kept)
    return kept, LeakRemoval(
        evaluation_documents=len(report.leaked),
        documents=len(train) - len(kept),
        paragraphs=lost_paragraphs,
        characters=characters,
    )


class _Index:
    """The runs of n words of the evaluation documents."""

    def __init__(self, evaluation: list[Document], ngram: int) -> None:
        self.ngram = ngram
        self.encode = _encoder()
        generator = np.random.default_rng(0)
        self.weights = generator.integers(0, 2**64, ngram, dtype=np.uint64) | np.uint64(1)
        words = [self.encode(document.content) for document in evaluation]
        families: dict[str, list[Hashes]] = {}
        for document, encoded in zip(evaluation, words, strict=True):
            families.setdefault(document.group, []).append(self.runs(encoded))
        distinct = [np.unique(np.concatenate(runs)) for runs in families.values()]
        found, counts = np.unique(_join(distinct), return_counts=True)
        self.boilerplate: Hashes = found[counts > BOILERPLATE_FAMILIES]
        self.documents: list[Hashes] = [self._own(encoded) for encoded in words]
        self.texts = [_whole(encoded) if len(encoded) < ngram else b"" for encoded in words]

    def _own(self, encoded: Hashes) -> Hashes:
        runs = np.unique(self.runs(encoded))
        return runs[~_among(runs, self.boilerplate)]

    def runs(self, encoded: Hashes) -> Hashes:
        """Return a hash of each run of n words: (words - n + 1,)."""
        count = len(encoded) - self.ngram + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        total = np.zeros(count, np.uint64)
        # Unsigned arithmetic wraps around: a hash modulo 2**64.
        for j, weight in enumerate(self.weights):
            total += encoded[j : j + count] * weight
        return total

    def of(self, positions: Iterable[int]) -> tuple[Hashes, frozenset[bytes]]:
        """Return the runs, and the whole short texts, of some evaluation documents."""
        chosen = list(positions)
        runs = np.unique(_join([self.documents[i] for i in chosen]))
        return runs, frozenset(self.texts[i] for i in chosen if self.texts[i])


def _report(train: list[Document], index: _Index, share: float) -> LeakReport:
    runs, _ = index.of(range(len(index.documents)))
    found: list[Hashes] = []
    texts: set[bytes] = set()
    for document in train:
        encoded = index.encode(document.content)
        own = index.runs(encoded)
        found.append(np.unique(own[_among(own, runs)]))
        texts.add(_whole(encoded))
    hits = np.unique(_join(found))
    shares = [
        float(text in texts) if text else float(_among(own, hits).mean()) if len(own) else 0.0
        for own, text in zip(index.documents, index.texts, strict=True)
    ]
    return LeakReport(index.ngram, share, tuple(shares), len(index.boilerplate))


def _clean(
    document: Document, runs: Hashes, texts: frozenset[bytes], index: _Index
) -> tuple[Document | None, int]:
    """Return what is left of a training document, and how many paragraphs it lost."""
    encoded = index.encode(document.content)
    if _whole(encoded) in texts:
        return None, 0
    hits = _among(index.runs(encoded), runs)
    if not hits.any():
        return document, 0
    if document.messages or document.label is not None:
        return None, 0
    blocks = paragraphs(document.text)
    before = len(blocks)
    # Taking a paragraph out makes neighbours of two others, and so new runs: until there are none.
    while hits.any():
        blocks = _untouched(blocks, hits, index)
        hits = _among(index.runs(index.encode("\n\n".join(blocks))), runs)
    if not blocks:
        return None, before
    return replace(document, text="\n\n".join(blocks)), before - len(blocks)


def _untouched(blocks: list[str], hits: NDArray[np.bool_], index: _Index) -> list[str]:
    touched = np.zeros(len(hits) + index.ngram - 1, dtype=bool)
    for start in np.flatnonzero(hits):
        touched[start : start + index.ngram] = True
    ends = np.cumsum([len(index.encode(block)) for block in blocks])
    starts = np.concatenate([[0], ends[:-1]])
    return [
        block
        for block, start, end in zip(blocks, starts, ends, strict=True)
        if not touched[start:end].any()
    ]


def _encoder() -> Encode:
    @cache
    def word(text: str) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def encode(text: str) -> Hashes:
        folded = unicodedata.normalize("NFC", text).casefold()
        return np.array([word(w) for w in WORD.findall(folded)], dtype=np.uint64)

    return encode


def _whole(encoded: Hashes) -> bytes:
    return blake2b(encoded.tobytes(), digest_size=16).digest() if len(encoded) else b""


def _among(values: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Return which values stand in an ordered array; `numpy.isin` would sort it at each call."""
    if len(ordered) == 0:
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return np.asarray(ordered[places] == values)


def _join(arrays: list[Hashes]) -> Hashes:
    return np.concatenate([np.empty(0, np.uint64), *arrays])
