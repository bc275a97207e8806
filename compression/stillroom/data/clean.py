"""Which documents are kept, and which are held out."""

import math
from collections import Counter, defaultdict
from hashlib import blake2b, sha256

from stillroom.data.documents import Document, normalise, paragraphs
from stillroom.errors import DataError


def filter_documents(
    documents: list[Document], min_characters: int, max_characters: int
) -> list[Document]:
    """Return the documents whose content has between so many characters, in their order.

    Raises:
        DataError: no document is left.
    """
    kept = [d for d in documents if min_characters <= len(d.content.strip()) <= max_characters]
    kept = [document for document in kept if document.content.strip()]
    if not kept:
        raise DataError(
            f"texts of {min_characters} to {max_characters} characters expected: none of "
            f"{len(documents)} has that length; change min_characters and max_characters"
        )
    return kept


def deduplicate(documents: list[Document]) -> list[Document]:
    """Return the documents without those whose paragraphs all stood in earlier ones.

    Paragraphs are equal when they are after NFC, one space for all white space and folded case;
    they are compared by 64-bit hashes. Conversations are compared whole, with their system
    message. The first of equal documents is kept, with its label.
    """
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        hashes = set(_content_hashes(document))
        if not hashes <= seen:
            kept.append(document)
        seen |= hashes
    return kept


def split_documents(
    documents: list[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) so that no family stands on both sides.

    Families are ranked by a hash of (seed, family) and held out in that order until `fraction` of
    the documents is reached; new documents move the boundary and shuffle nothing. A family is
    passed over where it would take the last document of a label from training.

    Raises:
        DataError: there are not two families to split.
    """
    families: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        families[document.group].append(document)
    wanted = math.ceil(fraction * len(documents))
    labels = Counter(document.label for document in documents)
    held_out: set[str] = set()
    count = 0
    for family in sorted(families, key=lambda name: _rank(seed, name)):
        if count >= wanted:
            break
        own = Counter(document.label for document in families[family])
        if all(labels[label] > own[label] for label in own):
            labels -= own
            held_out.add(family)
            count += len(families[family])
    if not held_out:
        raise DataError(
            f"two independent documents or more expected, one to learn from and one to hold out: "
            f"{len(documents)} documents of {len(families)} families and {len(labels)} labels "
            "came; give more text, or a separate evaluation text"
        )
    train = [document for document in documents if document.group not in held_out]
    return train, [document for document in documents if document.group in held_out]


def _rank(seed: int, family: str) -> bytes:
    return sha256(f"{seed}\n{family}".encode("utf-8", "surrogatepass")).digest()


def _content_hashes(document: Document) -> list[bytes]:
    if document.messages:
        pieces = ["\x00".join(f"{m['role']}\x01{m['content']}" for m in document.messages)]
    else:
        pieces = paragraphs(document.text)
    return [
        blake2b(normalise(piece).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for piece in pieces
    ]
