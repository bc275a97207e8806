"""Checkpoints in the store: pieces of unfinished work, found again by a rerun on any machine.

A piece's files lie at partial/<key>/files/<attempt>/, its listing at partial/<key>/<name>.json.
The listing is written last, so that until then the piece is absent, or is still its former self.
"""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.checkpoint import files_below, load_listed, remove_files, sha256_of
from stillroom.errors import CorruptedError, StoreError
from tasks.store.backend import Backend
from tasks.store.record import StoredFile

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")


class Piece(BaseModel):
    """The listing of one piece."""

    model_config = ConfigDict(frozen=True)

    attempt: str
    """The folder of this writing: two writers of one piece never mix their files."""
    files: tuple[StoredFile, ...]


class StoreCheckpoints:
    """The pieces that belong to one artifact key."""

    def __init__(self, backend: Backend, key: str) -> None:
        self.backend = backend
        self.key = key
        self.root = f"partial/{key}/"

    def names(self) -> list[str]:
        """Return the names of the complete pieces, sorted."""
        names = (entry.name.removeprefix(self.root) for entry in self.backend.list(self.root))
        return sorted(
            name.removesuffix(".json")
            for name in names
            if "/" not in name and name.endswith(".json")
        )

    def save(self, name: str, folder: Path) -> None:
        """Keep every file below `folder` as the piece `name`, all or nothing.

        Raises:
            StoreError: the store cannot be written; a former piece of this name stays.
        """
        listing, former = self.listing(name), self._former(name)
        attempt = uuid.uuid4().hex
        files = []
        try:
            for path in files_below(folder):
                relative = path.relative_to(folder).as_posix()
                size, sha256 = path.stat().st_size, sha256_of(path)
                self.backend.put_file(f"{self.root}files/{attempt}/{relative}", path)
                files.append(StoredFile(path=relative, size=size, sha256=sha256))
            piece = Piece(attempt=attempt, files=tuple(files))
            self.backend.replace(listing, piece.model_dump_json().encode())
        except StoreError:
            # On a full disk above all: an unfinished piece must not keep its space.
            self._clear(attempt)
            raise
        if former is not None:
            self._clear(former.attempt)

    def load(self, name: str, folder: Path) -> None:
        """Write the files of the piece `name` below `folder`, verified.

        Raises:
            PieceGoneError: there is no such piece, or no more.
            CorruptedError: a file is not the one that was saved.
        """

        def fetch(piece: Piece) -> str:
            for file in piece.files:
                if not self._fetch(self.content(piece, file), file, folder / file.path):
                    remove_files(folder, (each.path for each in piece.files))
                    return (
                        f"checkpoint {name} of {self.key[:12]}: {file.path} is not the file that "
                        "was saved; run `python -m flows store verify --repair`, then run again: "
                        "the work goes on from the pieces that are whole"
                    )
            return ""

        what = f"checkpoint named {name!r} at {self.backend.url}/{self.root}"
        load_listed(what, lambda: self.piece(name), fetch)

    def delete(self, name: str) -> None:
        """Forget the piece `name` and free its space; do nothing where there is none."""
        former = self._former(name)
        # The listing goes first: whatever happens next, no piece with missing files is seen.
        self.backend.delete(self.listing(name))
        if former is not None:
            self._clear(former.attempt)

    def discard(self) -> None:
        """Forget every piece, and whatever interrupted attempts left."""
        entries = list(self.backend.list(self.root))
        for entry in sorted(entries, key=lambda entry: entry.name.count("/")):
            self.backend.delete(entry.name)

    def piece(self, name: str) -> Piece | None:
        """Return the listing of the piece `name`, or None where there is none.

        Raises:
            CorruptedError: the listing cannot be read.
        """
        content = self.backend.read(self.listing(name))
        if content is None:
            return None
        try:
            return Piece.model_validate_json(content)
        except ValidationError as error:
            raise CorruptedError(
                f"the listing {self.backend.url}/{self.listing(name)} cannot be read; run "
                "`python -m flows store verify --repair`, then run again"
            ) from error

    def listing(self, name: str) -> str:
        """Return where the listing of the piece `name` lies in the store."""
        if not _NAME.fullmatch(name):
            raise StoreError(
                f"a checkpoint's name is made of letters, digits, '.', '_' and '-': {name!r} came"
            )
        return f"{self.root}{name}.json"

    def content(self, piece: Piece, file: StoredFile) -> str:
        """Return where the content of a piece's file lies in the store."""
        return f"{self.root}files/{piece.attempt}/{file.path}"

    def _fetch(self, content: str, file: StoredFile, target: Path) -> bool:
        found = self.backend.get(content, target)
        return found and target.stat().st_size == file.size and sha256_of(target) == file.sha256

    def _former(self, name: str) -> Piece | None:
        try:
            return self.piece(name)
        except CorruptedError:
            return None  # it is about to be replaced or removed; its files go with `discard`

    def _clear(self, attempt: str) -> None:
        for entry in list(self.backend.list(f"{self.root}files/{attempt}/")):
            self.backend.delete(entry.name)


def partial_keys(backend: Backend) -> Iterator[str]:
    """Yield the keys under which unfinished work is kept, sorted."""
    last = ""
    for entry in backend.list("partial/"):
        key = entry.name.split("/")[1]
        if key != last:
            yield key
        last = key
