"""Decide what a store no longer needs, and remove it.

Spared is what is registered, leased, or younger than a given age, and every blob that a spared
artifact needs. A blob whose manifest is not written yet is young, or its writer holds a lease; so
is a draft that is being written.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from stillroom.errors import CorruptedError
from tasks.store.backend import Entry, each
from tasks.store.lease import LEASE_SECONDS, LeaseNote, read_leases
from tasks.store.partial import partial_keys
from tasks.store.record import Record, blob_name
from tasks.store.store import ArtifactStore

T = TypeVar("T")
AT_A_TIME = 32
"""Removals between two looks at what came into use."""
What = Literal["artifacts", "blobs", "partials", "drafts"]
Reason = Literal["registered", "leased", "recent", "needed by a kept artifact", "work goes on"]


@dataclass(frozen=True)
class Spared:
    """How many things of one sort are kept, and why."""

    what: What
    reason: Reason
    count: int


@dataclass(frozen=True)
class CollectionPlan:
    """What would be removed. Nothing has been."""

    artifacts: tuple[Record, ...] = ()
    blobs: tuple[Entry, ...] = ()
    partials: tuple[tuple[str, int], ...] = ()
    """Key and bytes of unfinished work that nobody went on with."""
    drafts: tuple[Entry, ...] = ()
    """What interrupted writes left."""
    leases: tuple[str, ...] = ()
    """Leases that expired."""
    spared: tuple[Spared, ...] = ()

    @property
    def bytes_freed(self) -> int:
        """The bytes that removing all of it would free, manifests aside."""
        entries = (*self.blobs, *self.drafts)
        return sum(entry.size for entry in entries) + sum(size for _, size in self.partials)


class _Tally:
    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Spared] = {}

    def spare(self, what: What, reason: Reason) -> None:
        former = self.counts.get((what, reason))
        count = former.count + 1 if former else 1
        self.counts[what, reason] = Spared(what, reason, count)


def plan_collection(
    store: ArtifactStore,
    registered: Callable[[], set[str]],
    min_age: timedelta,
    now: datetime,
) -> CollectionPlan:
    """Return what may be removed from `store`.

    Args:
        store: where to look.
        registered: returns the keys of the artifacts that registered models come from.
        min_age: what was written less long ago than this is spared.
        now: the present moment, with its time zone.

    Raises:
        ServiceUnreachableError: `registered` could not ask; nothing is planned then.
        CorruptedError: a manifest cannot be read, so that its blobs are not known.
    """
    registered_keys = registered()
    notes = read_leases(store.backend)
    live = _live(notes, now)
    leased = _keys(live)
    youngest = now - min_age
    # Whoever begins to work writes its lease as a draft first, under no lease yet.
    begun = now - timedelta(seconds=LEASE_SECONDS)
    tally = _Tally()
    doomed: list[Record] = []
    needed: set[str] = set()
    for entry, record in _manifests(store, list(store.backend.list("artifacts/"))):
        reason = _reason(record.key, entry.modified > youngest, registered_keys, leased)
        if reason is None:
            doomed.append(record)
        else:
            tally.spare("artifacts", reason)
            needed |= _blobs_of([record])
    return CollectionPlan(
        artifacts=tuple(doomed),
        blobs=_loose_blobs(store, needed, youngest, _at_work(live.values()), tally),
        partials=_stale_partials(store, leased, youngest, tally),
        drafts=_left_drafts(store, min(youngest, begun), _at_work(live.values()), tally),
        leases=tuple(sorted(set(notes) - set(live))),
        spared=tuple(tally.counts.values()),
    )


def collect(store: ArtifactStore, plan: CollectionPlan, now: datetime) -> int:
    """Remove what is in `plan`, but for what came into use since, and return the bytes freed."""
    backend = store.backend
    for some in _steps(plan.artifacts):
        leased = _keys(_live(read_leases(backend), now))
        list(each(backend, [one for one in some if one.key not in leased], store.forget))
    freed = _remove_blobs(store, plan.blobs, now)
    for key, size in plan.partials:
        if key not in _keys(_live(read_leases(backend), now)):
            store.discard_checkpoints(key)
            freed += size
    live = _live(read_leases(backend), now)
    drafts = () if _at_work(live.values()) else plan.drafts
    for entry in drafts:
        backend.delete_draft(entry.name)
        freed += entry.size
    # Whoever slept longer than its lease has renewed it since.
    for name in set(plan.leases) - live.keys():
        backend.delete(name)
    return freed


def _remove_blobs(store: ArtifactStore, blobs: Sequence[Entry], now: datetime) -> int:
    """Remove a few at a time, each time after another look at who works and what was made."""
    backend, freed = store.backend, 0
    known: set[str] = set()
    needed: set[str] = set()
    for some in _steps(blobs):
        # Whoever works may count on a blob that no manifest names yet.
        if _at_work(_live(read_leases(backend), now).values()):
            break
        # Whoever has worked since has written a manifest before its lease went.
        fresh = [entry for entry in backend.list("artifacts/") if entry.name not in known]
        known |= {entry.name for entry in fresh}
        needed |= _blobs_of(record for _, record in _manifests(store, fresh))
        loose = [entry for entry in some if entry.name not in needed]
        list(each(backend, [entry.name for entry in loose], backend.delete))
        freed += sum(entry.size for entry in loose)
    return freed


def _steps(things: Sequence[T]) -> Iterator[Sequence[T]]:
    return (things[start : start + AT_A_TIME] for start in range(0, len(things), AT_A_TIME))


def _live(notes: dict[str, LeaseNote], now: datetime) -> dict[str, LeaseNote]:
    return {name: note for name, note in notes.items() if note.expires > now}


def _keys(live: dict[str, LeaseNote]) -> set[str]:
    return {key for note in live.values() for key in note.keys}


def _at_work(live: Iterable[LeaseNote]) -> bool:
    return any(not note.waits for note in live)


def _reason(key: str, recent: bool, registered: set[str], leased: set[str]) -> Reason | None:
    if key in registered:
        return "registered"
    if key in leased:
        return "leased"
    return "recent" if recent else None


def _loose_blobs(
    store: ArtifactStore, needed: set[str], youngest: datetime, working: bool, tally: _Tally
) -> tuple[Entry, ...]:
    loose = []
    for entry in store.backend.list("blobs/"):
        if entry.name in needed:
            tally.spare("blobs", "needed by a kept artifact")
        elif entry.modified > youngest:
            tally.spare("blobs", "recent")
        elif working:
            # A writer skips a blob that is there already, and names it in its manifest later.
            tally.spare("blobs", "work goes on")
        else:
            loose.append(entry)
    return tuple(loose)


def _stale_partials(
    store: ArtifactStore, leased: set[str], youngest: datetime, tally: _Tally
) -> tuple[tuple[str, int], ...]:
    stale = []
    for key in list(partial_keys(store.backend)):
        entries = list(store.backend.list(f"partial/{key}/"))
        if key in leased:
            tally.spare("partials", "leased")
        elif any(entry.modified > youngest for entry in entries):
            tally.spare("partials", "recent")
        else:
            stale.append((key, sum(entry.size for entry in entries)))
    return tuple(stale)


def _left_drafts(
    store: ArtifactStore, youngest: datetime, working: bool, tally: _Tally
) -> tuple[Entry, ...]:
    left = []
    for entry in store.backend.drafts():
        if entry.modified > youngest:
            tally.spare("drafts", "recent")
        elif working:
            tally.spare("drafts", "work goes on")
        else:
            left.append(entry)
    return tuple(left)


def _manifests(store: ArtifactStore, entries: list[Entry]) -> list[tuple[Entry, Record]]:
    def found(entry: Entry) -> Record | None:
        kind, _, file = entry.name.removeprefix("artifacts/").partition("/")
        return store.find(kind, file.removesuffix(".json"))

    try:
        records = list(each(store.backend, entries, found))
    except CorruptedError as error:
        raise CorruptedError(f"nothing can be collected: {error}") from error
    return [
        (entry, record)
        for entry, record in zip(entries, records, strict=True)
        if record is not None
    ]


def _blobs_of(records: Iterable[Record]) -> set[str]:
    return {blob_name(file.sha256) for record in records for file in record.files}
