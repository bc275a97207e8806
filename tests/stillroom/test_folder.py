"""What is done to a folder of the user's that a command fills."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import StoreError
from stillroom.folder import WHOLE, filling, replacing


def fill(folder: Path, *, fail: bool = False) -> None:
    """Leave one file, one folder and one link, beside something that is not wanted."""
    with filling(folder) as scratch:
        whole = scratch / WHOLE
        (whole / "deep").mkdir(parents=True)
        (scratch / "rest").write_text("")
        (whole / "deep" / "file").write_text("content")
        (whole / "a").symlink_to("deep/file")
        if fail:
            raise ValueError("half-way")


def assert_filled(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["a", "deep"]
    assert (folder / "a").read_text() == "content"


@pytest.mark.parametrize("how", ["new", "deep", "empty", "link", "dangling"])
def test_a_new_or_empty_folder_is_filled_and_nothing_else_left(tmp_path: Path, how: str) -> None:
    folder = tmp_path / ("x/y/here" if how == "deep" else "here")
    if how == "empty":
        folder.mkdir()
    if how in ("link", "dangling"):
        folder.symlink_to("real")
    if how == "link":
        (tmp_path / "real").mkdir()
    fill(folder)
    assert_filled(folder)
    assert {path.name for path in folder.parent.iterdir()} <= {"here", "real"}
    assert folder.is_symlink() == (how in ("link", "dangling"))


def test_folders_of_others_stay_whatever_their_names(tmp_path: Path) -> None:
    names = ["here.part", ".here.part", ".here.", "here.raw"]
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="half-way"):
        fill(tmp_path / "here", fail=True)
    fill(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "here"])


KILLED = """
import os, signal, sys
from pathlib import Path
from stillroom.folder import filling
with filling(Path(sys.argv[1])) as scratch:
    (scratch / "large").write_text("")
    print(scratch, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["beside", "within"])
def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    cwd = folder if where == "within" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Path(done.stdout.strip())
    assert (left / "large").exists()
    assert left.parent == cwd
    fill(folder)
    assert_filled(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_another_is_at_stays_and_the_first_to_end_wins(tmp_path: Path) -> None:
    def fill_meanwhile() -> None:
        with filling(tmp_path / "here") as scratch:
            (scratch / WHOLE).mkdir()
            fill(tmp_path / "here")
            assert (scratch / WHOLE).exists()

    with pytest.raises(StoreError, match="here cannot be written: Directory not empty"):
        fill_meanwhile()
    assert_filled(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_cannot_be_looked_at_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's folder, or one that only looks like ours."""
    for name in (".here.theirs", ".here.other"):
        (tmp_path / name).mkdir()
    (tmp_path / ".here.theirs" / ".stillroom-works-here").write_text("")
    real = Path.open

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent.name == ".here.theirs":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    fill(tmp_path / "here")
    assert_filled(tmp_path / "here")
    assert {path.name for path in tmp_path.iterdir()} == {"here", ".here.theirs", ".here.other"}


def test_of_a_failure_no_new_folder_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"):
        fill(tmp_path / "x" / "y" / "here", fail=True)
    assert list(tmp_path.iterdir()) == []


def test_a_mount_is_filled_from_within(mounted: Path) -> None:
    fill(mounted)
    assert_filled(mounted)


def test_the_folder_where_a_shell_stands_is_filled_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path())
    assert_filled(Path(os.curdir))


def test_a_folder_whose_parent_is_closed_is_filled_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    before = (tmp_path / "mine").stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    fill(tmp_path / "mine")
    assert_filled(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_ino == before


def test_a_failure_leaves_a_mount_empty(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="half-way"):
        fill(mounted, fail=True)
    assert list(mounted.iterdir()) == []
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "deep":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StoreError, match=r"a mount cannot be written: No space left on device"):
        fill(mounted)
    assert list(mounted.iterdir()) == []


def test_what_is_full_or_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"empty or a new folder and it holds letter\.txt"):
        fill(tmp_path)
    with pytest.raises(StoreError, match=r"empty or a new folder and it is a file"):
        fill(tmp_path / "letter.txt")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/here cannot be written: .*give another place"):
        fill(tmp_path / "file" / "here")


def write(file: Path, text: str, *, fail: bool = False) -> None:
    with replacing(file) as written:
        written.write_text(text)
        if fail:
            raise ValueError("half-way")


def test_a_file_is_replaced_once_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("old")
    (tmp_path / "model.gguf.part").write_text("somebody's")
    with pytest.raises(ValueError, match="half-way"):
        write(file, "ha", fail=True)
    assert file.read_text() == "old"
    write(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.gguf": "new",
        "model.gguf.part": "somebody's",
    }


def test_of_a_file_that_fails_no_new_folder_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"):
        write(tmp_path / "new" / "deep" / "a", "ha", fail=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(StoreError, match=r"model\.gguf cannot be written: Is a directory"):
        write(tmp_path / "model.gguf", "new")
