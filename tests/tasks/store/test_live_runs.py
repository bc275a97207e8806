"""Checkpoints that a run at work replaces and forgets, while others read and verify them."""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.checkpoint import TRIES, Checkpoints, FolderCheckpoints, NoCheckpoints
from stillroom.errors import CorruptedError, PieceGoneError, StoreError
from tasks.store.commands import _verify
from tasks.store.local import LocalBackend
from tasks.store.record import blob_name
from tasks.store.store import ArtifactStore
from tests.tasks.store.making import KEY, OTHER_KEY, add, damage, read_files, write_files

ROOT = f"partial/{KEY}/"


class Training:
    """What a training does to its checkpoints, as `TrainingState` does it."""

    def __init__(self, store: ArtifactStore, folder: Path) -> None:
        self.pieces = store.checkpoints(KEY)
        self.folder = folder
        self.step = 0

    def go_on(self) -> None:
        """Keep the next step, then forget the one before."""
        self.step += 1
        self.save(f"step-{self.step:08d}")
        self.pieces.delete(f"step-{self.step - 1:08d}")

    def save(self, name: str) -> None:
        self.step += name == "last"
        made = write_files(self.folder / str(self.step), {"a": b"%d" % self.step, "b": b"same"})
        self.pieces.save(name, made)


@pytest.fixture
def training(store: ArtifactStore, tmp_path: Path) -> Training:
    started = Training(store, tmp_path / "made")
    started.go_on()
    return started


@pytest.fixture
def meanwhile(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what has something done once, before or after the store does a thing."""

    def patch(method: str, do: Callable[[], object], *, after: bool = False) -> None:
        real = getattr(store.backend, method)
        waiting = [do]

        @functools.wraps(real)
        def disturbed(name: str, *args: Any, **options: Any) -> Any:
            if not name.startswith(ROOT):
                return real(name, *args, **options)
            if not after and waiting:
                waiting.pop()()
            answer = real(name, *args, **options)
            if after and waiting:
                answer = iter(list(answer)) if method == "list" else answer
                waiting.pop()()
            return answer

        monkeypatch.setattr(store.backend, method, disturbed)

    return patch


class TestVerify:
    @pytest.mark.parametrize("deep", [True, False])
    @pytest.mark.parametrize("what", ["forgotten", "replaced"])
    def test_pieces_that_change_after_the_sizes_were_listed_are_sound(
        self,
        store: ArtifactStore,
        training: Training,
        meanwhile: Callable[..., None],
        deep: bool,
        what: str,
    ) -> None:
        training.save("last")
        change = training.go_on if what == "forgotten" else lambda: training.save("last")
        meanwhile("list", change, after=True)
        assert list(store.verify(deep=deep)) == []

    @pytest.mark.parametrize("method", ["read", "sha256"])
    @pytest.mark.parametrize("after", [True, False])
    @pytest.mark.parametrize("what", ["forgotten", "replaced"])
    def test_a_piece_that_changes_while_it_is_examined_is_sound(
        self,
        store: ArtifactStore,
        training: Training,
        meanwhile: Callable[..., None],
        method: str,
        after: bool,
        what: str,
    ) -> None:
        if what == "replaced":
            training.pieces.delete("step-00000001")
            training.save("last")
        change = training.go_on if what == "forgotten" else lambda: training.save("last")
        meanwhile(method, change, after=after)
        assert list(store.verify()) == []

    def test_an_artifact_collected_meanwhile_misses_nothing(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = add(store, write_files(tmp_path / "made", {"a": b"1", "b": b"2"}))
        gone = add(store, write_files(tmp_path / "made", {"c": b"3"}), key=OTHER_KEY)
        shared, own = (blob_name(hashlib.sha256(content).hexdigest()) for content in (b"1", b"3"))
        real = store.backend.list

        def collected(prefix: str) -> Any:
            if prefix == "blobs/":
                store.forget(gone)
                for blob in (shared, own):
                    store.backend.delete(blob)
            return real(prefix)

        monkeypatch.setattr(store.backend, "list", collected)
        (problem,) = store.verify()
        assert problem.name == shared
        assert problem.useless == (kept.name,)

    def test_repair_keeps_what_a_training_saves_meanwhile(
        self,
        store: ArtifactStore,
        training: Training,
        meanwhile: Callable[..., None],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        meanwhile("list", training.go_on, after=True)
        assert _verify(store, deep=True, repair=True) == 0
        assert "is sound" in capsys.readouterr().out
        training.pieces.load("step-00000002", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"2", "b": b"same"}

    @pytest.mark.parametrize("damaged", ["content", "listing"])
    def test_repair_spares_what_was_saved_after_the_problem_was_found(
        self, store: ArtifactStore, training: Training, tmp_path: Path, damaged: str
    ) -> None:
        training.save("last")
        training.pieces.delete("step-00000001")
        if damaged == "listing":
            store.backend.replace(f"{ROOT}last.json", b'{"attempt": ')
        else:
            damage(store, next(store.backend.list(f"{ROOT}files/")).name)
        (problem,) = store.verify()
        training.save("last")
        assert not store.repair(problem)
        training.pieces.load("last", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"3", "b": b"same"}

    def test_a_piece_that_lacks_files_is_reported_and_removed(
        self, store: ArtifactStore, training: Training, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for entry in list(store.backend.list(f"{ROOT}files/")):
            store.backend.delete(entry.name)
        problems = list(store.verify(deep=False))
        assert [problem.what for problem in problems] == ["missing", "missing"]
        assert _verify(store, deep=True, repair=True) == 1
        assert "stays" not in capsys.readouterr().out
        assert training.pieces.names() == []
        assert list(store.verify()) == []


class TestLoad:
    @pytest.mark.parametrize("after", [True, False])
    def test_a_piece_saved_anew_meanwhile_is_loaded_as_it_is_then(
        self,
        store: ArtifactStore,
        training: Training,
        meanwhile: Callable[..., None],
        tmp_path: Path,
        after: bool,
    ) -> None:
        before = write_files(tmp_path / "before", {"a": b"0", "b": b"0", "only-here": b"0"})
        training.pieces.save("last", before)
        meanwhile("get", lambda: training.save("last"), after=after)
        store.checkpoints(KEY).load("last", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {"a": b"2", "b": b"same"}

    @pytest.mark.parametrize("after", [True, False])
    def test_a_piece_forgotten_meanwhile_is_gone_and_not_damaged(
        self,
        store: ArtifactStore,
        training: Training,
        meanwhile: Callable[..., None],
        tmp_path: Path,
        after: bool,
    ) -> None:
        meanwhile("get", training.go_on, after=after)
        with pytest.raises(PieceGoneError, match="no checkpoint named 'step-00000001'"):
            store.checkpoints(KEY).load("step-00000001", tmp_path / "loaded")
        assert read_files(tmp_path / "loaded") == {}

    def test_one_that_is_saved_without_end_is_given_up(
        self,
        store: ArtifactStore,
        training: Training,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        training.save("last")
        real, asked = store.backend.get, []

        def restless(name: str, target: Path, *, share: bool = False) -> bool:
            asked.append(name)
            training.save("last")
            return real(name, target, share=share)

        monkeypatch.setattr(store.backend, "get", restless)
        with pytest.raises(PieceGoneError, match=f"replaced {TRIES} times"):
            store.checkpoints(KEY).load("last", tmp_path / "loaded")
        assert len(asked) == TRIES


class TestContract:
    """What `Checkpoints` says of a piece that is gone or damaged, whoever keeps it."""

    @pytest.fixture(params=["folder", "store"])
    def kept(self, request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
        made: Checkpoints = FolderCheckpoints(tmp_path / "kept")
        if request.param == "store":
            made = ArtifactStore(LocalBackend(tmp_path / "kept")).checkpoints(KEY)
        made.save("piece", write_files(tmp_path / "made", {"a": b"1", "b": b"2"}))
        return made

    def test_what_is_not_there_is_gone(self, kept: Checkpoints, tmp_path: Path) -> None:
        kept.delete("piece")
        for checkpoints in (kept, NoCheckpoints()):
            with pytest.raises(PieceGoneError, match="no checkpoint named 'piece'"):
                checkpoints.load("piece", tmp_path / "loaded")

    @pytest.mark.parametrize("how", ["changed", "missing"])
    def test_what_is_listed_and_not_as_it_was_is_damaged(
        self, kept: Checkpoints, tmp_path: Path, how: str
    ) -> None:
        (file,) = (tmp_path / "kept").rglob("a")
        file.unlink()
        if how == "changed":
            file.write_bytes(b"3")
        with pytest.raises(CorruptedError, match="checkpoint piece"):
            kept.load("piece", tmp_path / "loaded")

    def test_what_is_deleted_while_it_is_copied_is_gone(
        self, kept: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = shutil.copyfile

        def copyfile(source: Path, target: Path) -> Path:
            kept.delete("piece")
            return real(source, target)

        monkeypatch.setattr(shutil, "copyfile", copyfile)
        with pytest.raises(PieceGoneError):
            kept.load("piece", tmp_path / "loaded")


def test_a_file_removed_while_it_is_copied_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(tmp_path / "store")
    backend.put_file("blobs/x", write_files(tmp_path / "made", {"a": b"1"}) / "a")
    real = shutil.copyfile

    def copyfile(source: Path, target: Path) -> Path:
        backend.delete("blobs/x")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert not backend.get("blobs/x", tmp_path / "here")


def test_a_folder_removed_while_a_store_is_listed_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(LocalBackend(tmp_path / "store"))
    record = add(store, write_files(tmp_path / "made"))
    store.checkpoints(KEY).save("piece", tmp_path / "made")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "files":
            shutil.rmtree(path, ignore_errors=True)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    names = [entry.name for entry in store.backend.list("")]
    assert record.name in names
    assert f"{ROOT}piece.json" in names
    assert not any(name.startswith(f"{ROOT}files/") for name in names)


def test_a_disk_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(tmp_path / "store")
    backend.replace("artifacts/x.json", b"{}")

    def scandir(path: Any) -> Iterator[Any]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error"):
        list(backend.list(""))
