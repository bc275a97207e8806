"""Look for what is missing or damaged in a store."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationError

from stillroom.errors import CorruptedError
from tasks.store.backend import Backend, each
from tasks.store.partial import Piece, StoreCheckpoints, partial_keys
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
    seen: bytes | None = None
    """The first of these as it was examined, where it may be replaced by a sound one."""


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
    for problem in each(backend, users.items(), lambda used: _examine_blob(blobs, *used)):
        if problem is not None:
            yield problem
    for key in partial_keys(backend):
        yield from _examine_checkpoints(backend, key, deep=deep)


def _examine_blob(blobs: "_Contents", file: StoredFile, users: list[str]) -> Problem | None:
    """Return what is wrong with a blob for artifacts that are still there."""
    name = blob_name(file.sha256)
    if blobs.examine(name, file, users) is None:
        return None
    # Whoever collects removes manifests first, then what only they needed; and a run may have made
    # both anew since the sizes were listed.
    left = [user for user in users if _content(blobs.backend, user) is not None]
    return _Contents(blobs.backend, name, blobs.deep).examine(name, file, left) if left else None


def _read(backend: Backend, name: str) -> Record | Problem | None:
    """Return a manifest, what is wrong with it, or None where it was removed since."""
    content = _content(backend, name)
    if content is None:
        return None
    try:
        record = Record.model_validate_json(content)
    except ValidationError:
        return _unreadable(name, content, "truncated or damaged")
    if record.name != name:
        return _unreadable(name, content, f"describes {record.name}")
    return record


def repair_problem(backend: Backend, problem: Problem) -> bool:
    """Remove what a problem makes useless, and return True; spare what is another one by now."""
    if problem.seen is not None:
        now = _content(backend, problem.useless[0])
        if now is not None and now != problem.seen:
            return False
    for name in problem.useless:
        backend.delete(name)
    return True


def _content(backend: Backend, name: str) -> bytes | None:
    """Return a listing or manifest, or None where there is none; empty where it is damaged."""
    try:
        return backend.read(name)
    except CorruptedError:
        return b""


def _examine_checkpoints(backend: Backend, key: str, *, deep: bool) -> Iterator[Problem]:
    pieces = _Pieces(backend, key, deep)
    for problems in each(backend, pieces.checkpoints.names(), pieces.examine):
        yield from problems


class _Pieces:
    """Examines the pieces of one key, which a run at work replaces and forgets meanwhile."""

    def __init__(self, backend: Backend, key: str, deep: bool) -> None:
        self.backend = backend
        self.deep = deep
        self.checkpoints = StoreCheckpoints(backend, key)
        self.contents = _Contents(backend, self.checkpoints.root, deep)

    def examine(self, name: str) -> list[Problem]:
        """Return what is wrong with a piece, and still is when it is looked at once more."""
        # The sizes of all pieces come by one request, which may be older than this piece.
        return self._look(name, self.contents) and self._look(name, None)

    def _look(self, name: str, contents: "_Contents | None") -> list[Problem]:
        listing = self.checkpoints.listing(name)
        seen = _content(self.backend, listing)
        if seen is None:
            return []
        try:
            piece = Piece.model_validate_json(seen)
        except ValidationError:
            problems = [_unreadable(listing, seen, "truncated or damaged")]
        else:
            problems = self._compare(piece, listing, seen, contents)
        # Files go after the listing that needs them: while that is the same, none may be missing.
        return problems if problems and _content(self.backend, listing) == seen else []

    def _compare(
        self, piece: Piece, listing: str, seen: bytes, contents: "_Contents | None"
    ) -> list[Problem]:
        if contents is None:
            folder = f"{self.checkpoints.root}files/{piece.attempt}/"
            contents = _Contents(self.backend, folder, self.deep)
        examined = (
            contents.examine(self.checkpoints.content(piece, file), file, [listing])
            for file in piece.files
        )
        return [replace(problem, seen=seen) for problem in examined if problem is not None]


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
        sha256 = self.backend.sha256(name) if self.deep else file.sha256
        if sha256 is None:
            return Problem("missing", name, f"missing, {used}", tuple(users))
        if sha256 != file.sha256:
            return Problem("content", name, f"its content has changed, {used}", (*users, name))
        return None


def _unreadable(name: str, content: bytes, text: str) -> Problem:
    return Problem("manifest", name, text, (name,), content)
