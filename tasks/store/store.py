"""The artifact store: find, add, fetch and verify immutable artifacts by their key."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from stillroom.checkpoint import Checkpoints, files_below, sha256_of
from stillroom.errors import CorruptedError, StoreError
from tasks.store.backend import Backend, each
from tasks.store.lease import LEASE_SECONDS, Lease, held
from tasks.store.local import LocalBackend
from tasks.store.partial import StoreCheckpoints
from tasks.store.record import Record, StoredFile, blob_name, manifest_name
from tasks.store.verify import REPAIR, Problem, find_problems, repair_problem


def open_store(url: str) -> "ArtifactStore":
    """Return the store at file:///folder, at a plain path, or at s3://bucket/prefix.

    Raises:
        StoreError: the address is of none of these forms.
    """
    if "://" not in url:
        if not url:
            raise StoreError("the store's address is empty; set STILLROOM_STORE")
        return ArtifactStore(LocalBackend(Path(url).expanduser()))
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return ArtifactStore(LocalBackend(Path(unquote(parts.path))))
    if parts.scheme == "s3" and parts.netloc and "@" not in parts.netloc:
        from tasks.store.s3 import S3Backend

        return ArtifactStore(S3Backend(parts.netloc, url.split("/", 3)[3] if parts.path else ""))
    raise StoreError(
        "a store's address is file:///folder, a path, or s3://bucket/prefix, without a login: "
        f"one that begins with {parts.scheme}:// came; correct STILLROOM_STORE"
    )


class ArtifactStore:
    """Artifacts over a backend: blobs by their hash, and one manifest that makes each exist."""

    def __init__(self, backend: Backend, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.backend = backend
        self.lease_seconds = lease_seconds
        self._leases: list[Lease] = []

    @property
    def url(self) -> str:
        """The store's address."""
        return self.backend.url

    def find(self, kind: str, key: str) -> Record | None:
        """Return the record of an artifact, or None where it does not exist.

        Raises:
            CorruptedError: its manifest cannot be read.
            StoreError: the store cannot be read.
        """
        name = manifest_name(kind, key)
        content = self.backend.read(name)
        if content is None:
            return None
        return self._parse(name, content)

    def records(self) -> Iterator[Record]:
        """Yield the record of every artifact.

        Raises:
            CorruptedError: a manifest cannot be read.
        """
        names = [entry.name for entry in self.backend.list("artifacts/")]
        for name, content in zip(names, each(self.backend, names, self.backend.read), strict=True):
            if content is not None:
                yield self._parse(name, content)

    # The manifest's own fields are its parameters: a dataclass would only repeat Record.
    def add(  # noqa: PLR0913
        self,
        folder: Path,
        *,
        kind: str,
        key: str,
        inputs: Mapping[str, str],
        section: Mapping[str, Any],
        versions: Mapping[str, str],
        stage_version: int,
        licence: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> Record:
        """Store every file below `folder` as an artifact, and return its record.

        The manifest is written last: an interrupted call leaves no artifact. Where another
        writer was first, its record is returned.

        Raises:
            StoreError: there is no file, or the store cannot be written.
        """
        with self.lease(key):
            files = tuple(
                each(self.backend, files_below(folder), lambda path: self._put(path, folder))
            )
            if not files:
                raise StoreError(f"an artifact needs at least one file: {folder} holds none")
            record = Record(
                kind=kind,
                key=key,
                files=files,
                inputs=dict(inputs),
                section=dict(section),
                versions=dict(versions),
                licence=licence,
                metrics=dict(metrics or {}),
                created=datetime.now(UTC),
                stage_version=stage_version,
            )
            # Read back, so that winner and losers hold the same values to the last digit.
            content = record.model_dump_json(indent=1).encode()
            if self.backend.put_if_absent(record.name, content):
                # What was there before may have gone, if a clean-up looked before the lease came.
                list(each(self.backend, files, lambda file: self._send(file, folder)))
                return self._parse(record.name, content)
            winner = self.find(kind, key)
        if winner is None:
            raise StoreError(
                f"{self.url}/{record.name} was removed while it was written; run again"
            )
        return winner

    def fetch(self, record: Record, folder: Path) -> Path:
        """Write an artifact's files below `folder`, verified, and return `folder`.

        On the local disk they may be the stored files themselves: read them, never write to them.

        Raises:
            CorruptedError: a file is missing, or is not the one that was stored.
        """
        # Whoever holds a lease while fetching is still at work with what it fetched.
        for lease in self._leases:
            lease.add(record.key)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in each(
            self.backend, record.files, lambda file: self._fetch(record, file, folder / file.path)
        ):
            pass
        return folder

    def read_file(self, record: Record, path: str) -> bytes | None:
        """Return one small file of an artifact, verified; None where it has none of that name.

        Raises:
            CorruptedError: the file is missing, or is not the one that was stored.
        """
        for file in record.files:
            if file.path == path:
                content = self.backend.read(blob_name(file.sha256))
                if content is None:
                    raise self._corrupted(record, file, "it is missing")
                if hashlib.sha256(content).hexdigest() != file.sha256:
                    raise self._corrupted(record, file, "its content has changed")
                return content
        return None

    def verify(self, deep: bool = True) -> Iterator[Problem]:
        """Yield what is wrong in the store; with `deep`, read and hash every file."""
        return find_problems(self.backend, deep=deep)

    def repair(self, problem: Problem) -> bool:
        """Remove what the problem makes useless, so that a rerun makes it again.

        Return False where a run at work has replaced it since: then it stays.
        """
        return repair_problem(self.backend, problem)

    def forget(self, record: Record) -> None:
        """Remove an artifact's manifest; its blobs stay, for others may use them."""
        self.backend.delete(record.name)

    def checkpoints(self, key: str) -> Checkpoints:
        """Return the unfinished work that is kept under `key`."""
        return StoreCheckpoints(self.backend, key)

    def discard_checkpoints(self, key: str) -> None:
        """Remove all unfinished work that is kept under `key`."""
        StoreCheckpoints(self.backend, key).discard()

    @contextlib.contextmanager
    def lease(self, *keys: str) -> Iterator[None]:
        """Have clean-ups spare these keys, what is fetched, and every new blob, meanwhile.

        Raises:
            StoreError: the store cannot be written.
        """
        with held(Lease(self.backend, keys, self.lease_seconds)) as lease:
            self._leases.append(lease)
            try:
                yield
            finally:
                self._leases.remove(lease)

    def _fetch(self, record: Record, file: StoredFile, target: Path) -> None:
        if not self.backend.get(blob_name(file.sha256), target, share=True):
            raise self._corrupted(record, file, "it is missing")
        size = target.stat().st_size
        if size != file.size:
            raise self._corrupted(record, file, f"{size} bytes instead of {file.size}")
        if sha256_of(target) != file.sha256:
            raise self._corrupted(record, file, "its content has changed")

    def _put(self, path: Path, folder: Path) -> StoredFile:
        relative = path.relative_to(folder).as_posix()
        file = StoredFile(path=relative, size=path.stat().st_size, sha256=sha256_of(path))
        self._send(file, folder)
        return file

    def _send(self, file: StoredFile, folder: Path) -> None:
        self.backend.put_file(blob_name(file.sha256), folder / file.path)

    def _parse(self, name: str, content: bytes) -> Record:
        try:
            record = Record.model_validate_json(content)
        except ValidationError as error:
            raise CorruptedError(
                f"the manifest {self.url}/{name} cannot be read: it is truncated or damaged; run "
                f"`{REPAIR}`, which removes it, then run again"
            ) from error
        if record.name != name:
            raise CorruptedError(
                f"the manifest {self.url}/{name} describes {record.name}; run `{REPAIR}`, which "
                "removes it, then run again"
            )
        return record

    def _corrupted(self, record: Record, file: StoredFile, what: str) -> CorruptedError:
        return CorruptedError(
            f"{file.path} of the {record.kind} {record.key[:12]} in {self.url}: {what}; run "
            f"`{REPAIR}`, which removes the broken artifact, then run again: it is made anew"
        )
