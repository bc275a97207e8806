"""What a clean-up removes, and what it must never touch."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest

import tasks.store.collect
from stillroom.errors import CorruptedError, ServiceUnreachableError
from tasks.store.collect import CollectionPlan, collect, plan_collection
from tasks.store.lease import Lease, leave_lease, take_lease
from tasks.store.local import LocalBackend
from tasks.store.record import Record, blob_name
from tasks.store.store import ArtifactStore
from tests.tasks.store.making import KEY, OTHER_KEY, add, read_files, write_files

WEEK = timedelta(days=7)
CONTENTS = (b"first", b"second", b"both")


def later(days: float = 8) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def none_registered() -> set[str]:
    return set()


def plan(store: ArtifactStore, registered: set[str] | None = None) -> CollectionPlan:
    return plan_collection(store, lambda: registered or set(), WEEK, later())


def spared(plan: CollectionPlan) -> set[tuple[str, str, int]]:
    return {(spared.what, spared.reason, spared.count) for spared in plan.spared}


@pytest.fixture
def pair(store: ArtifactStore, tmp_path: Path) -> tuple[Record, Record]:
    """Two artifacts that share one of their two files."""
    first, second, both = CONTENTS
    one = add(store, write_files(tmp_path / "one", {"own": first, "shared": both}))
    two = write_files(tmp_path / "two", {"own": second, "shared": both})
    return one, add(store, two, key=OTHER_KEY)


def test_what_nobody_needs_is_removed(store: ArtifactStore, pair: tuple[Record, Record]) -> None:
    planned = plan(store)
    assert {record.key for record in planned.artifacts} == {KEY, OTHER_KEY}
    assert len(planned.blobs) == 3
    assert planned.bytes_freed == len(b"firstsecondboth")
    assert len(list(store.records())) == 2  # planning removes nothing
    assert collect(store, planned, later()) == planned.bytes_freed
    assert list(store.backend.list("")) == []


def test_what_is_registered_is_spared_with_every_file_it_shares(
    store: ArtifactStore, pair: tuple[Record, Record], tmp_path: Path
) -> None:
    planned = plan(store, {KEY})
    assert [record.key for record in planned.artifacts] == [OTHER_KEY]
    assert spared(planned) == {
        ("artifacts", "registered", 1),
        ("blobs", "needed by a kept artifact", 2),
    }
    collect(store, planned, later())
    assert read_files(store.fetch(pair[0], tmp_path / "kept")) == {
        "own": b"first",
        "shared": b"both",
    }
    assert store.find("model", OTHER_KEY) is None
    assert list(store.verify()) == []


def test_what_is_recent_is_spared(store: ArtifactStore, pair: tuple[Record, Record]) -> None:
    store.backend.replace("blobs/" + "12" * 32, b"its manifest is not written yet")
    planned = plan_collection(store, none_registered, WEEK, later(days=6))
    assert (planned.artifacts, planned.blobs, planned.bytes_freed) == ((), (), 0)
    assert spared(planned) == {
        ("artifacts", "recent", 2),
        ("blobs", "needed by a kept artifact", 3),
        ("blobs", "recent", 1),
    }


def test_what_is_leased_is_spared_with_blobs_that_may_be_wanted(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    store.lease_seconds = timedelta(days=30).total_seconds()
    with store.lease(KEY):
        planned = plan(store)
        assert [record.key for record in planned.artifacts] == [OTHER_KEY]
        assert planned.blobs == ()
        assert spared(planned) == {
            ("artifacts", "leased", 1),
            ("blobs", "needed by a kept artifact", 2),
            ("blobs", "work goes on", 1),
        }
    assert len(plan(store).artifacts) == 2


def test_the_lease_of_a_killed_process_expires(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    lease = Lease(store.backend, [KEY], seconds=60)
    lease.start()
    planned = plan(store)
    assert len(planned.artifacts) == 2
    assert planned.leases == (lease.name,)
    lease.release()


def test_who_waits_keeps_its_artifacts_and_no_loose_blob(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    leave_lease(store.backend, "run", [KEY], later() + timedelta(days=1))
    planned = plan(store)
    assert [record.key for record in planned.artifacts] == [OTHER_KEY]
    assert len(planned.blobs) == 1
    assert collect(store, planned, later()) > 0
    assert [record.key for record in store.records()] == [KEY]
    assert list(store.verify()) == []
    store.backend.replace("leases/unread.json", b"{")
    assert plan(store).blobs == ()  # whoever wrote that may be at work
    store.backend.delete("leases/unread.json")

    take_lease(store.backend, "run")
    take_lease(store.backend, "run")  # twice: there is nothing left to take
    assert [record.key for record in plan(store).artifacts] == [KEY]


def test_a_lease_that_cannot_be_read_holds(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    store.backend.replace("leases/torn.json", b"{")
    assert plan(store).blobs == ()


def test_work_that_began_after_the_plan_is_spared(
    store: ArtifactStore, pair: tuple[Record, Record], tmp_path: Path
) -> None:
    store.checkpoints(KEY).save("piece", tmp_path / "one")
    planned = plan(store)
    assert (len(planned.artifacts), len(planned.blobs), len(planned.partials)) == (2, 3, 1)
    store.lease_seconds = timedelta(days=30).total_seconds()
    with store.lease(KEY):
        assert collect(store, planned, later()) == 0
        assert [record.key for record in store.records()] == [KEY]
        assert list(store.verify()) == []
        assert store.checkpoints(KEY).names() == ["piece"]


def test_a_blob_that_a_new_artifact_names_since_the_plan_is_spared(
    store: ArtifactStore, pair: tuple[Record, Record], tmp_path: Path
) -> None:
    planned = plan(store)
    new = add(store, tmp_path / "one", key="ef" * 32)
    collect(store, planned, later())
    assert list(store.records()) == [new]
    assert list(store.verify()) == []


def test_an_artifact_that_is_made_while_blobs_are_removed_stays_whole(
    store: ArtifactStore,
    pair: tuple[Record, Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks.store.collect, "AT_A_TIME", 1)
    planned, delete = plan(store), store.backend.delete

    def make_another_first(name: str) -> None:
        if name.startswith("blobs/") and not list(store.records()):
            other = next(blob for blob in planned.blobs if blob.name != name)
            (content,) = [
                each for each in CONTENTS if blob_name(sha256(each).hexdigest()) == other.name
            ]
            add(store, write_files(tmp_path / "new", {"own": content}), key="ef" * 32)
        delete(name)

    monkeypatch.setattr(store.backend, "delete", make_another_first)
    collect(store, planned, later())
    assert len(list(store.records())) == 1
    assert list(store.verify()) == []


@pytest.mark.parametrize(("days", "stale"), [(8, True), (6, False)])
def test_unfinished_work_goes_when_it_is_old(
    store: ArtifactStore, tmp_path: Path, days: int, stale: bool
) -> None:
    store.checkpoints(KEY).save("piece", write_files(tmp_path / "one", {"a": b"12345"}))
    planned = plan_collection(store, none_registered, WEEK, later(days))
    assert bool(planned.partials) is stale
    collect(store, planned, later(days))
    assert store.checkpoints(KEY).names() == ([] if stale else ["piece"])
    assert bool(list(store.backend.list("partial/"))) is not stale


def test_leased_unfinished_work_is_spared(store: ArtifactStore, tmp_path: Path) -> None:
    store.checkpoints(KEY).save("piece", write_files(tmp_path / "one", {"a": b"1"}))
    store.lease_seconds = timedelta(days=30).total_seconds()
    with store.lease(KEY):
        assert spared(plan(store)) == {("partials", "leased", 1)}


def test_nothing_is_done_where_the_registry_cannot_be_asked(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    def unreachable() -> set[str]:
        raise ServiceUnreachableError("MLflow does not answer")

    before = list(store.backend.list(""))
    with pytest.raises(ServiceUnreachableError):
        plan_collection(store, unreachable, WEEK, later())
    assert list(store.backend.list("")) == before


def test_nothing_is_planned_where_a_manifest_cannot_be_read(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    store.backend.replace(pair[0].name, b"{")
    with pytest.raises(CorruptedError, match="nothing can be collected"):
        plan(store)


def test_old_drafts_are_removed(tmp_path: Path) -> None:
    store = ArtifactStore(LocalBackend(tmp_path / "store"))
    (tmp_path / "store" / "blobs").mkdir(parents=True)
    draft = tmp_path / "store" / "blobs" / "ab.0f.part"
    draft.write_bytes(b"half")
    assert plan_collection(store, none_registered, WEEK, later(6)).drafts == ()
    assert collect(store, plan(store), later()) == 4
    assert not draft.exists()


def test_a_draft_that_is_being_written_is_spared(tmp_path: Path) -> None:
    store = ArtifactStore(LocalBackend(tmp_path / "store"))
    draft = tmp_path / "store" / "blobs" / "ab.0f.part"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    # It may be the lease of one who begins to work.
    planned = plan_collection(store, none_registered, timedelta(0), later(days=1e-4))
    assert (planned.drafts, spared(planned)) == ((), {("drafts", "recent", 1)})
    now = later(days=1)
    planned = plan_collection(store, none_registered, timedelta(0), now)
    assert [entry.size for entry in planned.drafts] == [4]
    store.lease_seconds = timedelta(days=30).total_seconds()
    with store.lease(KEY):
        assert collect(store, planned, now) == 0
        assert draft.exists()
        planned = plan_collection(store, none_registered, timedelta(0), now)
        assert (planned.drafts, spared(planned)) == ((), {("drafts", "work goes on", 1)})


def test_a_lease_that_was_renewed_since_the_plan_stays(
    store: ArtifactStore, pair: tuple[Record, Record]
) -> None:
    lease = Lease(store.backend, [KEY], seconds=60)
    lease.start()
    planned = plan(store)
    lease.seconds = timedelta(days=30).total_seconds()
    lease.add(OTHER_KEY)
    collect(store, planned, later())
    assert [entry.name for entry in store.backend.list("leases/")] == [lease.name]
    lease.release()
