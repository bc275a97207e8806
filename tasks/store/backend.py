"""What the artifact store needs from the place where it keeps its objects."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Entry(NamedTuple):
    """One object in a listing."""

    name: str
    size: int
    """Bytes."""
    modified: datetime
    """When it was last written, with a time zone."""


class Backend(Protocol):
    """Objects with names such as blobs/<sha256>, each complete or absent.

    Every method raises StoreError where the place refuses, and StoreUnreachableError where it
    does not answer.
    """

    @property
    def url(self) -> str:
        """The store's address, as people write it."""

    @property
    def requests(self) -> int:
        """How many files are worth asking for at once."""

    def get(self, name: str, target: Path, *, share: bool = False) -> bool:
        """Write an object to the file `target`; return False where there is none.

        With `share` the file may be the stored one itself, which nobody may write to.
        """

    def put_file(self, name: str, source: Path) -> None:
        """Store a file under a name that stands for its content.

        Nothing is sent where an object of this name and size is there already.
        """

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Store `content` unless the name is taken; return whether it was free."""

    def replace(self, name: str, content: bytes) -> None:
        """Store `content` in place of whatever the name held, all or nothing."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None where there is none."""

    def sha256(self, name: str) -> str | None:
        """Return the hash of an object's content as it is now, or None where there is none."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the complete objects whose names begin with `prefix`, sorted by name."""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing where there is none."""

    def drafts(self) -> Iterator[Entry]:
        """Yield what interrupted writes left behind."""

    def delete_draft(self, name: str) -> None:
        """Remove what an interrupted write left behind; do nothing where there is none."""


def each(backend: Backend, things: Iterable[T], do: Callable[[T], R]) -> Iterator[R]:
    """Yield what comes of each thing, in order; several at once where answers take their time."""
    if backend.requests == 1:
        yield from map(do, things)
        return
    with ThreadPoolExecutor(backend.requests) as pool:
        yield from pool.map(do, things)
