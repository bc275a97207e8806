"""Look for what is missing or damaged in a store."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from stillroom.errors import CorruptedError
from tasks.store.backend import Backend, each
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
    manifests = [entry.name for entry in backend.list("artifacts/")]
    for found in each(backend, manifests, lambda name: _read(backend, name)):
        if isinstance(found, Problem):
            yield found
        elif found is not None:
            for file in found.files:
                # One content may bear several names: it is examined once.
                blob = StoredFile(path="blob", size=file.size, sha256=file.sha256)
                if found.name not in users[blob]:
                    users[blob].append(found.name)
    blobs = _Contents(backend, "blobs/", deep)
    for problem in each(
        backend,
        users.items(),
        lambda used: blobs.examine(blob_name(used[0].sha256), used[0], used[1]),
    ):
        if problem is not None:
            yield problem
    for key in partial_keys(backend):
        yield from _examine_checkpoints(backend, key, deep=deep)


def _read(backend: Backend, name: str) -> Record | Problem | None:
    """Return a manifest, what is wrong with it, or None where it was removed since."""
    try:
        content = backend.read(name)
        record = None if content is None else Record.model_validate_json(content)
    except (CorruptedError, ValidationError):
        return _unreadable(name, "truncated or damaged")
    if record is not None and record.name != name:
        return _unreadable(name, f"describes {record.name}")
    return record


def _examine_checkpoints(backend: Backend, key: str, *, deep: bool) -> Iterator[Problem]:
    checkpoints = StoreCheckpoints(backend, key)
    contents = _Contents(backend, checkpoints.root, deep)

    def examine(name: str) -> list[Problem]:
        listing = checkpoints.listing(name)
        try:
            piece = checkpoints.piece(name)
        except CorruptedError:
            return [_unreadable(listing, "truncated or damaged")]
        if piece is None:
            return []
        examined = (
            contents.examine(checkpoints.content(piece, file), file, [listing])
            for file in piece.files
        )
        return [problem for problem in examined if problem is not None]

    for problems in each(backend, checkpoints.names(), examine):
        yield from problems


class _Contents:
    """Compares the objects below a prefix with what was written down of them."""

    def __init__(self, backend: Backend, prefix: str, deep: bool) -> None:
        self.backend = backend
        self.deep = deep
        self.sizes = {entry.name: entry.size for entry in backend.list(prefix)}

    def examine(self, name: str, file: StoredFile, users: list[str]) -> Problem | None:
        used = f"needed by {', '.join(users)}"
        size = self.sizes.get(name)
        if size is None:
            return Problem("missing", name, f"missing, {used}", tuple(users))
        if size != file.size:
            text = f"{size} bytes instead of {file.size}, {used}"
            return Problem("size", name, text, (*users, name))
        if self.deep and self.backend.sha256(name) != file.sha256:
            return Problem("content", name, f"its content has changed, {used}", (*users, name))
        return None


def _unreadable(name: str, text: str) -> Problem:
    return Problem("manifest", name, text, (name,))
