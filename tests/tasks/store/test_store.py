"""The contract of the artifact store, over every place that can hold one."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stillroom.errors import CorruptedError, StoreError
from tasks.store.lease import read_leases
from tasks.store.record import Record, blob_name
from tasks.store.store import ArtifactStore
from tests.tasks.store.making import (
    CONTENTS,
    KEY,
    OTHER_KEY,
    add,
    damage,
    random_bytes,
    read_files,
    write_files,
)

BIG_BLOB = "weights/model.safetensors"


def blob_of(record: Record, path: str) -> str:
    return next(blob_name(file.sha256) for file in record.files if file.path == path)


class TestArtifacts:
    def test_what_is_added_is_found_and_fetched(self, store: ArtifactStore, tmp_path: Path) -> None:
        assert store.find("model", KEY) is None
        metrics = {"loss": 0.1 + 0.2, "nan": math.nan, "limit": math.inf}
        record = add(store, write_files(tmp_path / "made"), metrics=metrics)
        found = store.find("model", KEY)
        assert found is not None
        assert found.model_dump_json() == record.model_dump_json()
        assert math.isnan(found.metrics["nan"])
        assert found.metrics["loss"] == 0.1 + 0.2
        assert found.size_bytes == sum(map(len, CONTENTS.values()))
        assert {file.path for file in found.files} == set(CONTENTS)
        assert read_files(store.fetch(found, tmp_path / "fetched")) == CONTENTS
        assert list(store.verify()) == []
        assert [known.key for known in store.records()] == [KEY]

    def test_a_kind_is_part_of_the_name(self, store: ArtifactStore, tmp_path: Path) -> None:
        add(store, write_files(tmp_path / "made"))
        assert store.find("data", KEY) is None
        assert store.find("model", OTHER_KEY) is None

    def test_an_artifact_without_files_is_refused(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        with pytest.raises(StoreError, match="at least one file"):
            add(store, tmp_path / "empty")
        assert store.find("model", KEY) is None

    def test_the_same_content_is_stored_once(self, store: ArtifactStore, tmp_path: Path) -> None:
        content = random_bytes(1000)
        write_files(tmp_path / "made", {"one": content, "two/same": content})
        add(store, tmp_path / "made")
        add(store, tmp_path / "made", key=OTHER_KEY)
        assert len(list(store.backend.list("blobs/"))) == 1

    def test_writing_on_in_the_workspace_changes_nothing_stored(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        folder = write_files(tmp_path / "made")
        add(store, folder)
        with (folder / BIG_BLOB).open("r+b") as file:
            file.write(b"changed")
        assert list(store.verify()) == []

    def test_a_file_in_parts_comes_back_whole(self, store: ArtifactStore, tmp_path: Path) -> None:
        content = random_bytes(9 * 2**20 + 17)
        record = add(store, write_files(tmp_path / "made", {"model": content}))
        assert read_files(store.fetch(record, tmp_path / "fetched")) == {"model": content}
        assert list(store.verify()) == []
        if hasattr(store.backend, "client"):
            name = "some/prefix/" + blob_of(record, "model")
            head = store.backend.client.head_object(Bucket=store.backend.bucket, Key=name)
            assert head["ETag"].strip('"').endswith("-2")

    def test_an_artifact_whose_writer_died_before_the_manifest_does_not_exist(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(name: str, content: bytes) -> bool:
            raise KeyboardInterrupt

        folder = write_files(tmp_path / "made")
        with monkeypatch.context() as patch:
            patch.setattr(store.backend, "put_if_absent", die)
            with pytest.raises(KeyboardInterrupt):
                add(store, folder)
        assert store.find("model", KEY) is None
        assert list(store.records()) == []
        assert len(list(store.backend.list("blobs/"))) == len(CONTENTS)
        record = add(store, folder)
        assert read_files(store.fetch(record, tmp_path / "fetched")) == CONTENTS

    def test_of_many_writers_one_wins_and_all_return_its_record(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        start = threading.Barrier(16)

        def write(number: int) -> Record:
            folder = write_files(tmp_path / str(number), {"model": str(number).encode()})
            start.wait()
            return add(store, folder, metrics={"writer": number})

        with ThreadPoolExecutor(16) as pool:
            records = list(pool.map(write, range(16)))
        stored = store.find("model", KEY)
        assert stored is not None
        assert records == [stored] * 16
        winner = str(int(stored.metrics["writer"])).encode()
        assert read_files(store.fetch(stored, tmp_path / "fetched")) == {"model": winner}


class TestDamage:
    @pytest.mark.parametrize(("truncate", "what"), [(False, "content"), (True, "size")])
    def test_a_damaged_file_is_named_repaired_and_made_again(
        self, store: ArtifactStore, tmp_path: Path, truncate: bool, what: str
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        name = blob_of(record, BIG_BLOB)
        damage(store, name, truncate=truncate)
        with pytest.raises(CorruptedError, match=f"{BIG_BLOB} of the model {KEY[:12]}.*--repair"):
            store.fetch(record, tmp_path / "fetched")
        (problem,) = store.verify()
        assert (problem.what, problem.name) == (what, name)
        assert KEY in problem.text
        store.repair(problem)
        assert store.find("model", KEY) is None
        assert list(store.verify()) == []
        again = add(store, tmp_path / "made")
        assert read_files(store.fetch(again, tmp_path / "again")) == CONTENTS

    def test_shallow_verification_reads_no_content(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        damage(store, blob_of(record, BIG_BLOB))
        assert list(store.verify(deep=False)) == []
        assert len(list(store.verify(deep=True))) == 1

    def test_files_of_a_far_store_are_verified_several_at_once(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add(store, write_files(tmp_path / "source", {"one": b"1", "two": b"2"}))
        far = store.backend.requests > 1
        meeting = threading.Barrier(2 if far else 1, timeout=10)
        sha256 = store.backend.sha256

        def met(name: str) -> str | None:
            meeting.wait()
            return sha256(name)

        monkeypatch.setattr(store.backend, "sha256", met)
        assert list(store.verify()) == []

    def test_a_missing_file_is_found(self, store: ArtifactStore, tmp_path: Path) -> None:
        record = add(store, write_files(tmp_path / "made"))
        store.backend.delete(blob_of(record, BIG_BLOB))
        with pytest.raises(CorruptedError, match="missing"):
            store.fetch(record, tmp_path / "fetched")
        (problem,) = store.verify(deep=False)
        assert problem.what == "missing"

    def test_repair_removes_every_artifact_that_needs_the_file_and_no_other(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        add(store, tmp_path / "made", key=OTHER_KEY)
        sound = add(store, write_files(tmp_path / "sound", {"x": b"sound"}), key="ef" * 32)
        damage(store, blob_of(record, BIG_BLOB))
        (problem,) = store.verify()
        store.repair(problem)
        assert list(store.records()) == [sound]

    @pytest.mark.parametrize("content", [b"", b'{"kind": "model", "key"', b"{}", b"\xff\x00"])
    def test_a_manifest_that_cannot_be_read_is_named(
        self, store: ArtifactStore, tmp_path: Path, content: bytes
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        store.backend.replace(record.name, content)
        with pytest.raises(CorruptedError, match=f"{record.name}.*--repair"):
            store.find("model", KEY)
        (problem,) = store.verify()
        assert (problem.what, problem.name) == ("manifest", record.name)
        store.repair(problem)
        assert store.find("model", KEY) is None

    def test_a_manifest_under_another_key_is_refused(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        content = store.backend.read(record.name)
        assert content is not None
        store.backend.replace(record.name.replace(KEY, OTHER_KEY), content)
        with pytest.raises(CorruptedError, match="describes"):
            store.find("model", OTHER_KEY)

    def test_forgetting_leaves_the_files_of_others(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        other = add(store, tmp_path / "made", key=OTHER_KEY)
        store.forget(record)
        assert store.find("model", KEY) is None
        assert read_files(store.fetch(other, tmp_path / "fetched")) == CONTENTS


class TestCheckpoints:
    def test_pieces_are_kept_for_the_next_attempt(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        first = store.checkpoints(KEY)
        assert first.names() == []
        first.save("shard-1", write_files(tmp_path / "one", {"a": b"1", "deep/b": b"2"}))
        first.save("shard-0", write_files(tmp_path / "two", {"a": b"3"}))
        again = store.checkpoints(KEY)
        assert again.names() == ["shard-0", "shard-1"]
        again.load("shard-1", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"1", "deep/b": b"2"}
        assert store.checkpoints(OTHER_KEY).names() == []
        with pytest.raises(StoreError, match="shard-2"):
            again.load("shard-2", tmp_path / "none")

    def test_a_loaded_file_may_be_written_to(self, store: ArtifactStore, tmp_path: Path) -> None:
        checkpoints = store.checkpoints(KEY)
        checkpoints.save("piece", write_files(tmp_path / "one", {"a": b"before"}))
        checkpoints.load("piece", tmp_path / "loaded")
        with (tmp_path / "loaded" / "a").open("r+b") as file:
            file.write(b"after!")
        checkpoints.load("piece", tmp_path / "again")
        assert read_files(tmp_path / "again") == {"a": b"before"}

    def test_deleting_frees_the_space_and_harms_no_other(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        checkpoints = store.checkpoints(KEY)
        folder = write_files(tmp_path / "one", {"a": b"same"})
        checkpoints.save("one", folder)
        checkpoints.save("two", folder)
        before = len(list(store.backend.list("partial/")))
        checkpoints.delete("one")
        checkpoints.delete("never-saved")  # nothing to do
        assert len(list(store.backend.list("partial/"))) == before - 2
        checkpoints.load("two", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"same"}

    def test_saving_again_replaces_and_leaves_nothing_behind(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        checkpoints = store.checkpoints(KEY)
        checkpoints.save("last", write_files(tmp_path / "one", {"a": b"1", "b": b"2"}))
        checkpoints.save("last", write_files(tmp_path / "two", {"a": b"3"}))
        checkpoints.load("last", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"3"}
        assert len(list(store.backend.list("partial/"))) == 2

    def test_a_failed_save_keeps_the_former_piece(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, content: bytes) -> None:
            raise StoreError("the disk is full")

        checkpoints = store.checkpoints(KEY)
        checkpoints.save("last", write_files(tmp_path / "one", {"a": b"1"}))
        with monkeypatch.context() as patch:
            patch.setattr(store.backend, "replace", refuse)
            with pytest.raises(StoreError, match="full"):
                checkpoints.save("last", write_files(tmp_path / "two", {"a": b"2"}))
        checkpoints.load("last", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"1"}
        assert len(list(store.backend.list("partial/"))) == 2

    def test_a_damaged_piece_is_refused_and_repaired(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        checkpoints = store.checkpoints(KEY)
        checkpoints.save("whole", write_files(tmp_path / "one", {"a": b"123"}))
        checkpoints.save("torn", tmp_path / "one")
        checkpoints.save("unlisted", tmp_path / "one")
        (torn,) = (
            entry.name
            for entry in store.backend.list(f"partial/{KEY}/files/")
            if b"torn" in _piece_with(store, entry.name)
        )
        damage(store, torn)
        store.backend.replace(f"partial/{KEY}/unlisted.json", b'{"attempt": ')
        with pytest.raises(CorruptedError, match=r"torn.*a is not the file"):
            checkpoints.load("torn", tmp_path / "loaded")
        with pytest.raises(CorruptedError, match=r"unlisted\.json cannot be read"):
            checkpoints.load("unlisted", tmp_path / "loaded")
        problems = list(store.verify())
        assert {problem.what for problem in problems} == {"content", "manifest"}
        for problem in problems:
            store.repair(problem)
        assert checkpoints.names() == ["whole"]

    def test_discarding_leaves_nothing_of_the_key(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        folder = write_files(tmp_path / "one", {"a": b"1"})
        store.checkpoints(KEY).save("one", folder)
        store.checkpoints(OTHER_KEY).save("one", folder)
        store.discard_checkpoints(KEY)
        assert all(OTHER_KEY in entry.name for entry in store.backend.list("partial/"))
        assert store.checkpoints(OTHER_KEY).names() == ["one"]

    @pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
    def test_a_name_that_is_a_path_is_refused(
        self, store: ArtifactStore, tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(StoreError, match="name"):
            store.checkpoints(KEY).save(name, tmp_path)


def _piece_with(store: ArtifactStore, content: str) -> bytes:
    """Return the name of the piece that lists the attempt a content belongs to."""
    attempt = content.split("/")[3].encode()
    for entry in store.backend.list(f"partial/{KEY}/"):
        listing = store.backend.read(entry.name) or b""
        if entry.name.endswith(".json") and attempt in listing:
            return entry.name.encode()
    return b""


class TestLeases:
    def test_a_lease_names_its_keys_and_what_is_fetched(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        record = add(store, write_files(tmp_path / "made"))
        with store.lease(OTHER_KEY):
            store.fetch(record, tmp_path / "fetched")
            (note,) = read_leases(store.backend).values()
            assert note.keys == (KEY, OTHER_KEY)
        assert read_leases(store.backend) == {}

    def test_a_lease_is_renewed_until_it_is_released(self, store: ArtifactStore) -> None:
        store.lease_seconds = 0.3
        with store.lease(KEY):
            (first,) = read_leases(store.backend).values()
            renewed = first
            for _ in range(100):
                if renewed.expires > first.expires:
                    break
                threading.Event().wait(0.05)
                (renewed,) = read_leases(store.backend).values()
            assert renewed.expires > first.expires
        assert read_leases(store.backend) == {}

    def test_an_error_releases_the_lease(self, store: ArtifactStore) -> None:
        with pytest.raises(RuntimeError), store.lease(KEY):
            raise RuntimeError
        assert read_leases(store.backend) == {}


class TestBackend:
    def test_names_are_taken_once(self, store: ArtifactStore) -> None:
        assert store.backend.put_if_absent("artifacts/a/b.json", b"first")
        assert not store.backend.put_if_absent("artifacts/a/b.json", b"second")
        assert store.backend.read("artifacts/a/b.json") == b"first"
        store.backend.replace("artifacts/a/b.json", b"third")
        assert store.backend.read("artifacts/a/b.json") == b"third"

    def test_what_is_not_there(self, store: ArtifactStore, tmp_path: Path) -> None:
        assert store.backend.read("artifacts/a/b.json") is None
        assert store.backend.sha256("blobs/none") is None
        assert not store.backend.get("blobs/none", tmp_path / "file")
        assert not (tmp_path / "file").exists()
        store.backend.delete("blobs/none")
        store.backend.delete_draft("blobs/none.part?upload")
        assert list(store.backend.list("")) == []
        assert list(store.backend.drafts()) == []

    def test_a_listing_is_sorted_and_keeps_to_its_prefix(self, store: ArtifactStore) -> None:
        for name in ("b/2", "a/x", "b/10", "b2/3"):
            store.backend.replace(name, name.encode())
        assert [entry.name for entry in store.backend.list("b/")] == ["b/10", "b/2"]
        assert [entry.size for entry in store.backend.list("b2")] == [4]
