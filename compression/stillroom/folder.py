"""Fill a folder of the user's with what was made aside: whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.errors import StoreError

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = str.maketrans({char: f"\\{ord(char):03o}" for char in " \t\n\\"})


def new_or_empty(folder: Path) -> Path:
    """Return where `folder` really lies, links followed.

    Raises:
        StoreError: it is a file, or holds something.
    """
    target = folder.expanduser().resolve()
    held = [path.name for path in target.iterdir()] if target.is_dir() else []
    if held or (target.exists() and not target.is_dir()):
        what = f"it holds {min(held)}" if held else "it is a file"
        raise StoreError(
            f"{folder} must be an empty or a new folder and {what}; choose another one"
        )
    return target


def fill(target: Path, make: Callable[[Path], Path]) -> None:
    """Put the folder that `make` leaves, below the temporary one it is given, at `target`.

    Nobody else's folder is touched, whatever its name, and of a failure nothing is left.

    Args:
        target: what `new_or_empty` returned.
        make: called with an empty folder on the file system of `target`.

    Raises:
        StoreError: the place cannot be written to.
    """
    inside = target.is_dir() and _must_stay(target)
    place = target if inside else target.parent
    with _explained(target):
        place.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
    try:
        made = make(part)
        with _explained(target):
            if inside:
                _move_out(made, target)
            else:
                made.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
            "another folder"
        ) from error
