"""The list of what a registered model holds: every file with its size and SHA-256.

It travels with the model as `stillroom.json`, so that whoever fetches the model can tell that all
of it came, and nothing else.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from stillroom.checkpoint import files_below, sha256_of
from stillroom.errors import CorruptedError

LISTING = "stillroom.json"
FORMAT = 1
Kind = Literal["base", "adapter"]
Task = Literal["causal_lm", "masked_lm", "sequence_classification"]


@dataclass(frozen=True)
class Entry:
    """One file: its path below the model's folder, its size in bytes, its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class BaseReference:
    """The registered version that an adapter sits on, and the files it must consist of."""

    name: str
    version: str
    artifact_key: str
    files: tuple[Entry, ...]


@dataclass(frozen=True)
class Contents:
    """What a registered version holds, and what it was made from."""

    kind: Kind
    task: Task
    artifact_key: str
    licence: str
    files: tuple[Entry, ...]
    base: BaseReference | None = None

    def to_json(self) -> str:
        """Return the text of `stillroom.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)

    def sha256(self) -> str:
        """Return a SHA-256 over the files alone: the same for the same content."""
        lines = "\n".join(f"{file.sha256} {file.path}" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def list_files(folder: Path) -> tuple[Entry, ...]:
    """Return every file below `folder` with its size and SHA-256, sorted by path."""
    return tuple(
        Entry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path))
        for path in files_below(folder)
    )


def read_contents(file: Path) -> Contents:
    """Return the contents that a `stillroom.json` lists.

    Raises:
        CorruptedError: it is missing, cut off, or names files outside of its folder.
    """
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        base = raw["base"]
        contents = Contents(
            kind=_one_of(raw["kind"], Kind),
            task=_one_of(raw["task"], Task),
            artifact_key=raw["artifact_key"],
            licence=raw["licence"],
            files=_entries(raw["files"]),
            base=None
            if base is None
            else BaseReference(**{**base, "files": _entries(base["files"])}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptedError(
            f"{file.name} does not list what the model holds ({type(error).__name__}): register "
            "the model again"
        ) from error
    return contents


def verify_files(folder: Path, files: tuple[Entry, ...], what: str) -> None:
    """Check that `folder` holds exactly `files`; `what` names the model in the message.

    Raises:
        CorruptedError: a file is missing, is not the one listed, or is not listed.
    """
    for file in files:
        path = folder / file.path
        if not path.is_file():
            raise CorruptedError(f"{what}: {file.path} is missing; fetch it again")
        if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            raise CorruptedError(
                f"{what}: {file.path} is not the file that was registered: expected {file.size} "
                f"bytes with SHA-256 {file.sha256[:12]}…, {path.stat().st_size} bytes with "
                f"{sha256_of(path)[:12]}… came; fetch it again, or register the model again"
            )
    listed = {file.path for file in files}
    for path in files_below(folder):
        if (relative := path.relative_to(folder).as_posix()) not in listed:
            raise CorruptedError(f"{what}: {relative} was never registered; do not use this copy")


def _entries(raw: list[dict[str, Any]]) -> tuple[Entry, ...]:
    entries = tuple(Entry(**entry) for entry in raw)
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(entry.path)
    return entries


def _one_of(word: Any, closed_set: Any) -> Any:
    if word not in get_args(closed_set):
        raise ValueError(word)
    return word
