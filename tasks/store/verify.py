"""Look for what is missing or damaged in a store."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from stillroom.errors import CorruptedError
from tasks.store.backend import Backend
from tasks.store.partial import StoreCheckpoints, partial_keys
from tasks.store.record import Record, StoredFile, blob_name

REPAIR = "python -m flows store verify --repair"

What = Literal["manifest", "missing", "size", "content"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    what: What
    name: str
    """The object that is wrong."""
    text: str
    useless: tuple[str, ...]
    """What it makes useless, in the order in which it may be removed."""


def find_problems(backend: Backend, *, deep: bool) -> Iterator[Problem]:
    """Yield what is wrong with artifacts and checkpoints; with `deep`, hash every file."""
    users: dict[StoredFile, list[str]] = defaultdict(list)
    for entry in backend.list("artifacts/"):
        try:
            content = backend.read(entry.name)
            if content is None:
                continue  # removed since it was listed
            record = Record.model_validate_json(content)
        except (CorruptedError, ValidationError):
            yield _unreadable(entry.name, "truncated or damaged")
            continue
        if record.name != entry.name:
            yield _unreadable(entry.name, f"describes {record.name}")
            continue
        for file in record.files:
            # One content may bear several names: it is examined once.
            blob = StoredFile(path="blob", size=file.size, sha256=file.sha256)
            if entry.name not in users[blob]:
                users[blob].append(entry.name)
    sizes = {entry.name: entry.size for entry in backend.list("blobs/")}
    for blob, manifests in users.items():
        name = blob_name(blob.sha256)
        yield from _examine(backend, name, blob, sizes, manifests, deep=deep)
    for key in partial_keys(backend):
        yield from _examine_checkpoints(backend, key, deep=deep)


def _examine_checkpoints(backend: Backend, key: str, *, deep: bool) -> Iterator[Problem]:
    checkpoints = StoreCheckpoints(backend, key)
    sizes = {entry.name: entry.size for entry in backend.list(checkpoints.root)}
    for name in checkpoints.names():
        listing = checkpoints.listing(name)
        try:
            piece = checkpoints.piece(name)
        except CorruptedError:
            yield _unreadable(listing, "truncated or damaged")
            continue
        for file in piece.files if piece else ():
            content = checkpoints.content(piece, file) if piece else ""
            yield from _examine(backend, content, file, sizes, [listing], deep=deep)


def _examine(
    backend: Backend,
    name: str,
    file: StoredFile,
    sizes: dict[str, int],
    users: list[str],
    *,
    deep: bool,
) -> Iterator[Problem]:
    used = f"needed by {', '.join(users)}"
    if name not in sizes:
        yield Problem("missing", name, f"missing, {used}", tuple(users))
    elif sizes[name] != file.size:
        text = f"{sizes[name]} bytes instead of {file.size}, {used}"
        yield Problem("size", name, text, (*users, name))
    elif deep and backend.sha256(name) != file.sha256:
        yield Problem("content", name, f"its content has changed, {used}", (*users, name))


def _unreadable(name: str, text: str) -> Problem:
    return Problem("manifest", name, text, (name,))
