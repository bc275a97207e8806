"""A store in a local folder: each object is a file, written aside and then put in place."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from stillroom.checkpoint import sha256_of
from stillroom.errors import StoreError
from tasks.store.backend import Entry

READ_ONLY = 0o444
DRAFT = ".part"
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LocalBackend:
    """Keep objects as files below a folder, which is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        """The folder as a file:// address."""
        return self.root.as_uri()

    @property
    def requests(self) -> int:
        """One: a disk makes nobody wait for an answer."""
        return 1

    def get(self, name: str, target: Path, *, share: bool = False) -> bool:
        """Write an object to the file `target`; return False where there is none."""
        source = self.root / name
        with explained_disk(f"{target} cannot be written"):
            if not source.is_file():
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if share:
                # Another file system, or a file that somebody else owns: then it is copied.
                with contextlib.suppress(OSError):
                    os.link(source, target)
                    return True
            try:
                shutil.copyfile(source, target)
            except FileNotFoundError:
                if source.exists():
                    raise
                return False  # removed since it was looked for
            return True

    def put_file(self, name: str, source: Path) -> None:
        """Store a file under a name that stands for its content."""
        target = self.root / name
        with self._writing():
            if target.is_file() and target.stat().st_size == source.stat().st_size:
                # A writer that counts on it makes it recent again: a clean-up then spares it.
                # Another user's file cannot be touched: then it is replaced by the same.
                with contextlib.suppress(PermissionError):
                    os.utime(target)
                    return
        # Copied, never linked: the caller may go on writing to its own file.
        with self._draft(target) as draft, self._writing():
            shutil.copyfile(source, draft)
            draft.chmod(READ_ONLY)
            _flush(draft)
            os.replace(draft, target)
            _flush(target.parent)

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Store `content` unless the name is taken; return whether it was free."""
        target = self.root / name
        with self._draft(target) as draft, self._writing():
            draft.write_bytes(content)
            _flush(draft)
            try:
                os.link(draft, target)
            except FileExistsError:
                return False
            _flush(target.parent)
            return True

    def replace(self, name: str, content: bytes) -> None:
        """Store `content` in place of whatever the name held, all or nothing."""
        target = self.root / name
        with self._draft(target) as draft, self._writing():
            draft.write_bytes(content)
            _flush(draft)
            os.replace(draft, target)
            _flush(target.parent)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None where there is none."""
        with explained_disk(f"{self.root / name} cannot be read"):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def sha256(self, name: str) -> str | None:
        """Return the hash of an object's content as it is now, or None where there is none."""
        with explained_disk(f"{self.root / name} cannot be read"):
            try:
                return sha256_of(self.root / name)
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the complete objects whose names begin with `prefix`, sorted by name."""
        return (entry for entry in self._walk(prefix) if not entry.name.endswith(DRAFT))

    def delete(self, name: str) -> None:
        """Remove an object, and the folders of unfinished work that this leaves empty."""
        with explained_disk(f"{self.root / name} cannot be removed"):
            (self.root / name).unlink(missing_ok=True)
        # Elsewhere a folder stays: another writer may be about to put something into it.
        for folder in (self.root / name).parents:
            if self.root / "partial" not in folder.parents:
                break
            try:
                folder.rmdir()
            except OSError:
                break  # it holds other objects, or is gone already

    def drafts(self) -> Iterator[Entry]:
        """Yield what interrupted writes left behind."""
        return (entry for entry in self._walk("") if entry.name.endswith(DRAFT))

    def delete_draft(self, name: str) -> None:
        """Remove what an interrupted write left behind."""
        self.delete(name)

    def _walk(self, prefix: str) -> Iterator[Entry]:
        with explained_disk(f"{self.root} cannot be read"):
            if self.root.exists() and not self.root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
            for path in sorted(_files_below(self.root / prefix.rpartition("/")[0])):
                name = path.relative_to(self.root).as_posix()
                if not name.startswith(prefix):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    status = path.stat()
                    if path.is_file():
                        modified = datetime.fromtimestamp(status.st_mtime, UTC)
                        yield Entry(name, status.st_size, modified)

    @contextlib.contextmanager
    def _draft(self, target: Path) -> Iterator[Path]:
        """Lend a name beside `target`, and remove what is left there whatever happens."""
        draft = target.with_name(f"{target.name}.{uuid.uuid4().hex}{DRAFT}")
        with self._writing():
            draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
        finally:
            # Where even this is refused the draft is collected later, as any abandoned one.
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return explained_disk(f"the store {self.root} cannot be written")


@contextlib.contextmanager
def explained_disk(what: str) -> Iterator[None]:
    """Turn what the operating system refuses into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            text = (
                f"{what}: the disk is full ({reason}); nothing half-written was left. Free some "
                "space (`python -m flows store gc --dry-run` shows what can go) and run again"
            )
        elif error.errno in _REFUSED:
            text = (
                f"{what}: {reason}. Expected a folder with read and write access; make it "
                "writable, or set STILLROOM_STORE to one that is"
            )
        else:
            text = f"{what}: {reason}; check STILLROOM_STORE and the disk, then run again"
        raise StoreError(text) from error


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield what is no folder below `folder`; a folder that is removed meanwhile has nothing."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, _, names in os.walk(folder, onerror=unless_gone):
        yield from (Path(parent, name) for name in names)


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
