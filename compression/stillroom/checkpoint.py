"""Partial work that outlives the process: named pieces, each complete or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stillroom.errors import CorruptedError, StoreError


class Checkpoints(Protocol):
    """Named pieces of unfinished work, kept where the next attempt will find them."""

    def names(self) -> list[str]:
        """Return the names of the complete pieces, sorted."""

    def save(self, name: str, folder: Path) -> None:
        """Keep every file below `folder` as the piece `name`, all or nothing."""

    def load(self, name: str, folder: Path) -> None:
        """Write the files of the piece `name` below `folder`.

        Raises:
            StoreError: there is no such piece.
            CorruptedError: a file is not the one that was saved.
        """

    def delete(self, name: str) -> None:
        """Forget the piece `name`; do nothing where there is none."""


class NoCheckpoints:
    """Keep nothing: the work starts anew each time."""

    def names(self) -> list[str]:
        """Return no names."""
        return []

    def save(self, name: str, folder: Path) -> None:
        """Keep nothing."""

    def load(self, name: str, folder: Path) -> None:
        """Refuse: nothing was kept.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"no checkpoint named {name!r}: this work keeps none")

    def delete(self, name: str) -> None:
        """Forget nothing."""


class FolderCheckpoints:
    """Keep the pieces in a local folder, for work that runs without an artifact store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Return the names of the complete pieces, sorted."""
        return sorted(path.stem for path in self.root.glob("*.json"))

    def save(self, name: str, folder: Path) -> None:
        """Keep every file below `folder` as the piece `name`, all or nothing."""
        self.delete(name)
        target = self.root / name
        shutil.copytree(folder, target)
        hashes = {str(path.relative_to(folder)): sha256_of(path) for path in files_below(folder)}
        # The list is written last and renamed into place: until then the piece does not exist.
        draft = self.root / f"{name}.json.part"
        draft.write_text(json.dumps(hashes, sort_keys=True))
        os.replace(draft, self.root / f"{name}.json")

    def load(self, name: str, folder: Path) -> None:
        """Write the files of the piece `name` below `folder`, verified."""
        listing = self.root / f"{name}.json"
        if not listing.exists():
            raise StoreError(f"no checkpoint named {name!r} in {self.root}")
        for relative, expected in json.loads(listing.read_text()).items():
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name / relative, target)
            if sha256_of(target) != expected:
                raise CorruptedError(
                    f"checkpoint {name}: {relative} has changed since it was written; "
                    f"delete {self.root / name} and run again"
                )

    def delete(self, name: str) -> None:
        """Forget the piece `name`; do nothing where there is none."""
        (self.root / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every regular file below `folder`, in a fixed order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
