"""Partial work that outlives the process: named pieces, each complete or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from stillroom.errors import CorruptedError, PieceGoneError

TRIES = 5
T = TypeVar("T")


class Checkpoints(Protocol):
    """Named pieces of unfinished work, kept where the next attempt will find them.

    Another run of the same work may save and delete pieces meanwhile. What `names` gave may be
    gone when it is loaded: whoever can do without it then asks for the names again.
    """

    def names(self) -> list[str]:
        """Return the names of the complete pieces, sorted."""

    def save(self, name: str, folder: Path) -> None:
        """Keep every file below `folder` as the piece `name`, all or nothing."""

    def load(self, name: str, folder: Path) -> None:
        """Write the files of the piece `name` below `folder`, all of one saving.

        Raises:
            PieceGoneError: there is no such piece, or no more.
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
            PieceGoneError: always.
        """
        raise PieceGoneError(f"no checkpoint named {name!r}: this work keeps none")

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
        """Write the files of the piece `name` below `folder`, verified.

        Raises:
            PieceGoneError: there is no such piece, or no more.
            CorruptedError: a file is not the one that was saved.
        """

        def listing() -> dict[str, str] | None:
            try:
                hashes: dict[str, str] = json.loads((self.root / f"{name}.json").read_text())
            except FileNotFoundError:
                return None
            return hashes

        def fetch(hashes: dict[str, str]) -> str:
            for relative, expected in hashes.items():
                source, target = self.root / name / relative, folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    sound = sha256_of(shutil.copyfile(source, target)) == expected
                except FileNotFoundError:
                    sound = False
                if not sound:
                    remove_files(folder, hashes)
                    return (
                        f"checkpoint {name}: {relative} has changed since it was written; "
                        f"delete {self.root / name} and run again"
                    )
            return ""

        load_listed(f"checkpoint named {name!r} in {self.root}", listing, fetch)

    def delete(self, name: str) -> None:
        """Forget the piece `name`; do nothing where there is none."""
        (self.root / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)


def load_listed(what: str, listing: Callable[[], T | None], fetch: Callable[[T], str]) -> None:
    """Fetch a piece as its listing says; where that fails, as the listing of then says.

    A run at work replaces and forgets pieces: a file that does not fit is damaged only where the
    piece is still listed as it was. `fetch` returns what is wrong, or "".

    Raises:
        PieceGoneError: there is no listing, or no more.
        CorruptedError: a file is not the one that is listed.
    """
    for _ in range(TRIES):
        listed = listing()
        if listed is None:
            raise PieceGoneError(
                f"no {what}, or no more; if another run of the same work is under way, run again "
                "when it has ended"
            )
        problem = fetch(listed)
        if not problem:
            return
        if listing() == listed:
            raise CorruptedError(problem)
    raise PieceGoneError(
        f"the {what} was replaced {TRIES} times while it was read: another run of the same work "
        "saves it; run again when that has ended"
    )


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the named files below `folder`, as far as they are there."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every regular file below `folder`, in a fixed order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
