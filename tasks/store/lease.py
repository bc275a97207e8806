"""Leases: who works with the store now, so that a clean-up spares what they need."""

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from stillroom.errors import StoreError
from tasks.store.backend import Backend

# A killed process holds its lease for this long; a living one renews it three times as often.
LEASE_SECONDS = 900.0

_log = logging.getLogger(__name__)


class LeaseNote(BaseModel):
    """What a lease says in the store, at leases/<uuid>.json."""

    model_config = ConfigDict(frozen=True)

    keys: tuple[str, ...]
    expires: AwareDatetime
    waits: bool = False
    """Nobody works under it: its keys are needed again, and no blob is being written."""


class Lease:
    """A claim on keys that is renewed in the background until it is released."""

    def __init__(self, backend: Backend, keys: Iterable[str], seconds: float) -> None:
        self.backend = backend
        self.name = f"leases/{uuid.uuid4()}.json"
        self.seconds = seconds
        self._keys = set(keys)
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="store-lease", daemon=True)

    def start(self) -> None:
        """Write the lease and begin to renew it."""
        self._write()
        self._heart.start()

    def add(self, key: str) -> None:
        """Claim one more key."""
        with self._lock:
            known = key in self._keys
            self._keys.add(key)
        if not known:
            self._write()

    def release(self) -> None:
        """Stop renewing, and remove the lease."""
        self._released.set()
        self._heart.join()
        _remove(self.backend, self.name)

    def _write(self) -> None:
        with self._lock:
            expires = datetime.now(UTC) + timedelta(seconds=self.seconds)
            note = LeaseNote(keys=tuple(sorted(self._keys)), expires=expires)
            self.backend.replace(self.name, note.model_dump_json().encode())

    def _beat(self) -> None:
        while not self._released.wait(self.seconds / 3):
            try:
                self._write()
            except StoreError as error:
                _log.warning("the lease %s could not be renewed: %s", self.name, error)


@contextlib.contextmanager
def held(lease: Lease) -> Iterator[Lease]:
    """Hold a lease for as long as the block runs."""
    lease.start()
    try:
        yield lease
    finally:
        lease.release()


def leave_lease(backend: Backend, name: str, keys: Iterable[str], until: datetime) -> None:
    """Claim keys for someone who is to come back by a moment, and works on nothing meanwhile."""
    note = LeaseNote(keys=tuple(sorted(set(keys))), expires=until, waits=True)
    backend.replace(_left(name), note.model_dump_json().encode())


def take_lease(backend: Backend, name: str) -> None:
    """Remove a lease that was left, if there is one: who left it has come back."""
    _remove(backend, _left(name))


def read_leases(backend: Backend) -> dict[str, LeaseNote]:
    """Return every lease by its name; one that cannot be read counts as held for ever."""
    notes = {}
    for entry in backend.list("leases/"):
        content = backend.read(entry.name)
        if content is None:
            continue  # released since it was listed
        try:
            notes[entry.name] = LeaseNote.model_validate_json(content)
        except ValidationError:
            _log.warning("the lease %s cannot be read; delete it if nobody works", entry.name)
            notes[entry.name] = LeaseNote(keys=(), expires=datetime.max.replace(tzinfo=UTC))
    return notes


def _left(name: str) -> str:
    return f"leases/left-{name}.json"


def _remove(backend: Backend, name: str) -> None:
    try:
        backend.delete(name)
    except StoreError as error:
        # The work is done; the lease only delays a clean-up until it expires by itself.
        _log.warning("the lease %s stays until it expires: %s", name, error)
