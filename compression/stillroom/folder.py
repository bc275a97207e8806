"""Write a folder or a file of the user's aside first, so that it comes whole, or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillroom.errors import StoreError

WHOLE = "whole"

_UNLOCKED, _LOCKED = ".stillroom-begins", ".stillroom-works-here"

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = str.maketrans({char: f"\\{ord(char):03o}" for char in " \t\n\\"})


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Give an empty folder to work in, of which `WHOLE` is what `folder` becomes at the end.

    It lies on the file system of `folder`. Nobody else's folder is touched, whatever its name, and
    of a failure nothing is left.

    Args:
        folder: must not exist, or be empty; it may be a mount, or a link to a folder.

    Raises:
        StoreError: it is a file, holds something, or cannot be written to.
    """
    with _explained(folder):
        target = _new_or_empty(folder)
    inside = target.is_dir() and _must_stay(target)
    with _scratch(target, target if inside else target.parent) as scratch:
        yield scratch
        with _explained(target):
            if inside:
                _move_out(scratch / WHOLE, target)
            else:
                (scratch / WHOLE).replace(target)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `file` at the end.

    It lies on the file system of `file`, whose folder is made where it is absent. Nobody else's
    file is touched, whatever its name, and of a failure nothing is left.

    Raises:
        StoreError: the place cannot be written to, or is a folder.
    """
    with _scratch(file, file.parent) as scratch:
        yield scratch / file.name
        with _explained(file):
            (scratch / file.name).replace(file)


@contextmanager
def _scratch(target: Path, place: Path) -> Iterator[Path]:
    """Lend a hidden folder in `place`, which is made where it is absent, to work at `target` in.

    Where nothing comes of it, what was made for it goes again. While it is lent it bears a locked
    file, by which whoever comes next can tell it from one that a killed process left.
    """
    absent = [path for path in (place, *place.parents) if not path.exists()]
    with _explained(target):
        place.mkdir(parents=True, exist_ok=True)
        _remove_left(target, place)
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=place))
    try:
        with (scratch / _UNLOCKED).open("w") as mark:
            with suppress(OSError):  # a file system without locks: what is left there stays
                fcntl.flock(mark, fcntl.LOCK_EX)
                (scratch / _UNLOCKED).rename(scratch / _LOCKED)
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # up to the first that holds something
            for path in absent:
                path.rmdir()


def _remove_left(target: Path, place: Path) -> None:
    """Remove what killed processes left of their work at `target`."""
    for path in place.iterdir() if os.access(place, os.R_OK) else ():
        if path.name.startswith(_prefix(target)):
            # Somebody is at work there, or it is another user's, or nobody's.
            with suppress(OSError), (path / _LOCKED).open("r+") as mark:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}."


def _new_or_empty(folder: Path) -> Path:
    """Return where `folder` really lies, links followed."""
    target = folder.expanduser().resolve()
    if target.is_dir():
        _remove_left(target, target)
    held = [path.name for path in target.iterdir()] if target.is_dir() else []
    if held or (target.exists() and not target.is_dir()):
        what = f"it holds {min(held)}" if held else "it is a file"
        raise StoreError(
            f"{folder} must be an empty or a new folder and {what}; choose another one"
        )
    return target


def _must_stay(folder: Path) -> bool:
    """Return whether another folder cannot take its place.

    So it is of a mount, of the folder where this process (and a shell) stands, and in a folder
    that is closed to us.
    """
    return (
        _is_mount(folder)
        or os.path.samefile(folder, os.curdir)
        or not os.access(folder.parent, os.W_OK | os.X_OK)
    )


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    # One that is bound to another of the same disk looks like any other folder.
    lines = os.fsdecode(_MOUNTS.read_bytes()).splitlines() if _MOUNTS.exists() else []
    return str(folder).translate(_ESCAPED) in {line.split(" ")[4] for line in lines}


def _move_out(made: Path, target: Path) -> None:
    moved: list[Path] = []
    try:
        for child in sorted(made.iterdir()):
            moved.append(target / child.name)
            child.rename(moved[-1])
    except BaseException:
        for path in moved:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{target} cannot be written: {error.strerror or error}; make it writable, or give "
            "another place"
        ) from error
