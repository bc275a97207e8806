"""What is done to a folder of the user's that a command fills."""

import os
from pathlib import Path

import pytest

from stillroom.errors import StoreError
from stillroom.folder import fill, new_or_empty


def make(part: Path) -> Path:
    """Leave one file, one folder and one link, beside something that is not wanted."""
    made = part / "made"
    (made / "deep").mkdir(parents=True)
    (part / "rest").write_text("")
    (made / "deep" / "file").write_text("content")
    (made / "a").symlink_to("deep/file")
    return made


def fail(part: Path) -> Path:
    make(part)
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
    fill(new_or_empty(folder), make)
    assert_filled(folder)
    assert {path.name for path in folder.parent.iterdir()} <= {"here", "real"}
    assert folder.is_symlink() == (how in ("link", "dangling"))


def test_folders_of_others_stay_whatever_their_names(tmp_path: Path) -> None:
    names = ["here.part", ".here.part", ".here.", "here.raw"]
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="half-way"):
        fill(new_or_empty(tmp_path / "here"), fail)
    fill(new_or_empty(tmp_path / "here"), make)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "here"])


def test_a_mount_is_filled_from_within(mounted: Path) -> None:
    fill(new_or_empty(mounted), make)
    assert_filled(mounted)


def test_the_folder_where_a_shell_stands_is_filled_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(new_or_empty(Path()), make)
    assert_filled(Path(os.curdir))


def test_a_folder_whose_parent_is_closed_is_filled_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    before = (tmp_path / "mine").stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    fill(new_or_empty(tmp_path / "mine"), make)
    assert_filled(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_ino == before


def test_a_failure_leaves_a_mount_empty(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="half-way"):
        fill(new_or_empty(mounted), fail)
    assert list(mounted.iterdir()) == []
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "deep":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StoreError, match=r"a mount cannot be written: No space left on device"):
        fill(new_or_empty(mounted), make)
    assert list(mounted.iterdir()) == []


def test_what_is_full_or_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"empty or a new folder and it holds letter\.txt"):
        new_or_empty(tmp_path)
    with pytest.raises(StoreError, match=r"empty or a new folder and it is a file"):
        new_or_empty(tmp_path / "letter.txt")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/here cannot be written: .*give another folder"):
        fill(new_or_empty(tmp_path / "file" / "here"), make)
