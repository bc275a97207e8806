"""`store ls`, `store verify` and `store gc`, as a terminal shows them."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.errors import ServiceUnreachableError, StoreError
from tasks.store.commands import add_store_commands, readable_size, run_store_command
from tasks.store.record import blob_name
from tasks.store.store import ArtifactStore, open_store
from tests.tasks.store.making import KEY, OTHER_KEY, add, damage, read_files, write_files


@pytest.fixture
def folder_store(tmp_path: Path) -> ArtifactStore:
    store = open_store(str(tmp_path / "store"))
    add(store, write_files(tmp_path / "made"))
    return store


def run(store: ArtifactStore, *words: str, registered: set[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_store_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["store", *words])
    return run_store_command(args, store, lambda: registered or set())


def test_ls_shows_each_artifact(
    folder_store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder_store, tmp_path / "made", key=OTHER_KEY)
    assert run(folder_store, "ls") == 0
    header, first, second, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["kind", "key", "size", "created", "(UTC)", "files"]
    created = next(folder_store.records()).created
    day, minute = created.strftime("%Y-%m-%d %H:%M").split()
    assert first.split() == ["model", KEY[:12], "10.2", "kB", day, minute, "3"]
    assert OTHER_KEY[:12] in second
    assert total.startswith("2 artifacts, 10.2 kB in file://")


def test_ls_of_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(open_store(str(tmp_path / "none")), "ls") == 0
    assert "0 artifacts, 0 B" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_verify_finds_repairs_and_is_content(
    folder_store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder_store, "verify") == 0
    assert "is sound" in capsys.readouterr().out
    (record,) = folder_store.records()
    name = blob_name(next(file.sha256 for file in record.files if file.size > 100))
    damage(folder_store, name)
    assert run(folder_store, "verify", "--shallow") == 0
    capsys.readouterr()
    assert run(folder_store, "verify") == 1
    out = capsys.readouterr().out
    assert f"{name}: its content has changed" in out
    assert "--repair" in out
    assert run(folder_store, "verify", "--repair") == 1
    assert run(folder_store, "verify") == 0
    assert folder_store.find("model", KEY) is None


def test_gc_says_what_it_would_do_before_it_does_it(
    folder_store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder_store, "gc") == 0
    out = capsys.readouterr().out
    assert "spared: 1 artifacts (recent)" in out
    assert "0 B freed" in out
    assert run(folder_store, "gc", "--dry-run", "--min-age-days", "0") == 0
    out = capsys.readouterr().out
    assert "10.2 kB would be freed" in out
    assert KEY[:12] in out
    assert run(folder_store, "gc", "--min-age-days", "0", registered={KEY}) == 0
    assert "spared: 1 artifacts (registered)" in capsys.readouterr().out
    assert folder_store.find("model", KEY) is not None
    assert run(folder_store, "gc", "--min-age-days", "0") == 0
    assert "10.2 kB freed" in capsys.readouterr().out
    assert list(folder_store.backend.list("")) == []


def test_gc_does_nothing_where_the_registry_cannot_be_asked(folder_store: ArtifactStore) -> None:
    def unreachable() -> set[str]:
        raise ServiceUnreachableError("MLflow does not answer")

    parser = argparse.ArgumentParser()
    add_store_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["store", "gc", "--min-age-days", "0"])
    with pytest.raises(ServiceUnreachableError):
        run_store_command(args, folder_store, unreachable)
    assert folder_store.find("model", KEY) is not None


@pytest.mark.parametrize("days", ["-1", "nan", "many"])
def test_a_senseless_age_is_refused(folder_store: ArtifactStore, days: str) -> None:
    with pytest.raises(SystemExit):
        run(folder_store, "gc", "--min-age-days", days)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (93_000_000, "93.0 MB"), (3 * 10**12, "3.0 TB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable_size(size) == text


def test_a_local_store_needs_neither_boto3_nor_torch(tmp_path: Path) -> None:
    program = (
        "import sys, tasks.store.commands, tasks.store.store as s; "
        f"list(s.open_store({str(tmp_path)!r}).records()); "
        "sys.exit(bool({'boto3', 'botocore', 'torch'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_fetch_writes_one_artifact_and_refuses_what_is_not_one(
    folder_store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder_store, "fetch", KEY[:12], str(tmp_path / "new")) == 0
    assert read_files(tmp_path / "new") == read_files(tmp_path / "made")
    assert f"model {KEY[:12]} verified" in capsys.readouterr().out
    with pytest.raises(StoreError, match="not empty"):
        run(folder_store, "fetch", KEY[:12], str(tmp_path / "new"))
    with pytest.raises(StoreError, match=r"0 artifacts .* begin with 'ffff'"):
        run(folder_store, "fetch", "ffff", str(tmp_path / "other"))
    add(folder_store, tmp_path / "made", key=OTHER_KEY)
    with pytest.raises(StoreError, match=r"2 artifacts .* begin with ''"):
        run(folder_store, "fetch", "", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
