"""What bad recipes, models, texts, stores and disks lead to: one line, and nothing lost."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.terminal import ROOT, Terminal, assert_done, assert_refused, assert_sound

Open = Callable[..., Terminal]
Recipe = dict[str, Any]
FIRST_STAGES = ("import teacher", "prepare data")


class TestRecipe:
    """Refused before anything starts: no server is needed to say so."""

    @pytest.fixture
    def alone(self, tmp_path: Path) -> Terminal:
        return Terminal(tmp_path, {"STILLROOM_HOME": str(tmp_path / "home")})

    @pytest.mark.parametrize("mode", [(), ("--plan",)], ids=["run", "plan"])
    def test_an_unknown_key(self, alone: Terminal, recipe: Recipe, mode: tuple[str]) -> None:
        recipe["quantization"]["bit"] = 4
        alone.write(recipe)
        done = alone.compress(*mode)
        assert_refused(done, "recipe.yaml: quantization.bit: unknown key", "flows schema")
        assert not alone.home.exists()

    def test_five_bits(self, alone: Terminal, recipe: Recipe) -> None:
        alone.write(recipe)
        done = alone.compress("--set", "quantization.bits=5")
        assert_refused(done, "quantization.bits", "2, 3, 4 or 8", "5 came")
        assert not alone.home.exists()

    def test_a_recipe_that_is_not_there(self, alone: Terminal) -> None:
        assert_refused(alone.compress(), "recipe recipe.yaml is not there")

    def test_a_recipe_that_is_no_yaml(self, alone: Terminal) -> None:
        (alone.folder / "recipe.yaml").write_text("name: [tiny\n")
        assert_refused(alone.compress(), "recipe.yaml is not YAML")

    @pytest.mark.parametrize("place", ["teacher.source", "data.train.source"])
    def test_planning_names_a_source_that_is_not_there(
        self, alone: Terminal, recipe: Recipe, parts: Path, place: str
    ) -> None:
        for part in parts.iterdir():
            (alone.folder / part.name).symlink_to(part)
        alone.write(recipe)
        done = alone.compress("--plan", "--set", f"{place}=./nowhere")
        assert_refused(done, "./nowhere")
        assert not alone.home.exists()


@pytest.mark.integration
class TestRun:
    def test_a_group_that_divides_nothing(
        self, terminal: Open, finished: Terminal, recipe: Recipe
    ) -> None:
        user = terminal(like=finished)
        before = len(list(user.store.records()))
        user.write(recipe)
        done = user.compress("--set", "quantization.group_size=48")
        assert_refused(done, "group_size must divide in_features: 48 does not divide 64")
        assert user.versions() == 0
        assert len(list(user.store.records())) == before
        assert_sound(user)
        # Mended, it goes on: what was made before is Cached, and only now something is published.
        assert_done(user.compress(), (*FIRST_STAGES, "cache teacher", "distil student", "quantize"))
        assert user.versions() == 1

    @pytest.mark.parametrize(
        ("place", "source", "words"),
        [
            ("teacher.source", "./nowhere", "./nowhere holds no model"),
            ("data.train.source", "./nowhere.txt", "./nowhere.txt: no such file or folder"),
            ("teacher.source", "no-one/nothing", "model no-one/nothing cannot be found on the hub"),
            ("teacher.source", "builtin:nothing", "builtin:nothing is not known"),
        ],
    )
    def test_a_source_that_is_not_there(
        self, terminal: Open, recipe: Recipe, place: str, source: str, words: str
    ) -> None:
        user = terminal()
        user.write(recipe)
        assert_refused(user.compress("--set", f"{place}={source}"), words)
        assert user.records("dataset") == []
        assert user.versions() == 0
        assert_sound(user)

    @pytest.mark.parametrize(
        ("text", "words"),
        [("", "is empty"), ("A cat sat on a mat by the sea.", "32 tokens needed, 31 came")],
        ids=["empty", "short"],
    )
    def test_a_text_that_fills_no_row(
        self, terminal: Open, finished: Terminal, recipe: Recipe, text: str, words: str
    ) -> None:
        user = terminal(like=finished)
        (user.folder / "little.txt").write_text(text)
        user.write(recipe)
        before = len(list(user.store.records()))
        done = user.compress("--set", "data.train.source=little.txt")
        assert_refused(done, words)
        assert len(list(user.store.records())) == before
        assert user.versions() == 0
        assert_sound(user)

    def test_a_champion_with_another_tokenizer(
        self, terminal: Open, finished: Terminal, recipe: Recipe, parts: Path
    ) -> None:
        """Student, cache and data take the teacher's tokenizer; a champion brings its own."""
        user = terminal(like=finished)
        del recipe["distillation"], recipe["quantization"]
        user.write(recipe)
        assert_done(user.compress(), (*FIRST_STAGES, "evaluate teacher"))
        assert user.versions() == 1
        _other_tokenizer(parts / "teacher", user.folder / "other")
        compare = ["--set", "gates.max_champion_loss_nats=1", "--set", "teacher.source=other"]
        done = user.compress(*compare)
        assert_refused(done, "tokenizer", "another name")
        assert user.versions() == 1
        assert_sound(user)

    def test_a_flipped_byte(self, terminal: Open, finished: Terminal, recipe: Recipe) -> None:
        user = terminal(like=finished)
        user.write(recipe)
        (student,) = [r for r in user.records("model") if "soft_weight" in r.section]
        weights = max(student.files, key=lambda file: file.size)
        _flip(user.home / "store" / "blobs" / weights.sha256)
        change = ("--set", "quantization.bits=3")
        words = ("model.safetensors", "its content has changed", "store verify --repair")
        assert_refused(user.compress(*change), *words)
        assert user.versions() == 0
        # As the line says: repair, and run again.
        repaired = user.type("store", "verify", "--repair")
        assert repaired.returncode == 1
        assert weights.sha256 in repaired.stdout
        assert_sound(user)
        assert_done(user.compress(*change), (*FIRST_STAGES, "cache teacher"))
        assert user.versions() == 1
        assert student.files == next(r for r in user.records("model") if r.key == student.key).files

    def test_a_truncated_manifest(self, terminal: Open, finished: Terminal, recipe: Recipe) -> None:
        user = terminal(like=finished)
        user.write(recipe)
        (data,) = user.records("dataset")
        manifest = user.home / "store" / data.name
        manifest.chmod(0o644)
        manifest.write_bytes(manifest.read_bytes()[:-20])
        words = (data.name, "truncated or damaged", "store verify --repair")
        assert_refused(user.compress("--plan"), *words)
        assert_refused(user.compress(), *words)
        assert user.versions() == 0
        assert user.type("store", "verify", "--repair").returncode == 1
        done = user.compress()
        assert_done(done, ("import teacher", "cache teacher", "distil student", "quantize"))
        assert user.versions() == 1
        assert_sound(user)

    def test_a_model_of_nonsense(self, terminal: Open, recipe: Recipe, parts: Path) -> None:
        user = terminal()
        (user.folder / "broken").mkdir()
        for file in (parts / "teacher").iterdir():
            content = file.read_bytes()
            cut = len(content) // 2 if file.suffix == ".safetensors" else len(content)
            (user.folder / "broken" / file.name).write_bytes(content[:cut])
        del recipe["distillation"], recipe["publish"]
        user.write(recipe)
        assert_refused(user.compress("--set", "teacher.source=broken"), "cannot be loaded")
        assert_sound(user)


@pytest.mark.integration
class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        """A real file system of 24 MiB."""
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    @pytest.fixture
    def on_disk(self, terminal: Open, finished: Terminal, disk: Path, recipe: Recipe) -> Terminal:
        """A home on that disk, with the first stages done."""
        user = terminal(like=finished)
        shutil.move(user.home, disk / "home")
        user.variables["STILLROOM_HOME"] = str(disk / "home")
        del recipe["distillation"]
        user.write(recipe)
        return user

    def test_a_full_disk(self, on_disk: Terminal, disk: Path) -> None:
        before = len(list(on_disk.store.records()))
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        # Enough for the log of the run and a little more, and not for the work.
        (disk / "filler").write_bytes(bytes(free - 200_000))
        assert_refused(on_disk.compress(), "the disk is full")
        (disk / "filler").unlink()
        assert len(list(on_disk.store.records())) == before
        assert on_disk.versions() == 0
        assert_sound(on_disk)
        assert_done(on_disk.compress(), FIRST_STAGES)
        assert on_disk.versions() == 1

    def test_a_disk_without_any_room(self, on_disk: Terminal, disk: Path) -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free))
        assert_refused(on_disk.compress(), "the disk is full")
        (disk / "filler").unlink()
        assert_sound(on_disk)

    def test_a_read_only_store(self, on_disk: Terminal, disk: Path, tmp_path: Path) -> None:
        """The store alone cannot be written; the rest of the home can."""
        before = len(list(on_disk.store.records()))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        shutil.move(disk / "home" / "mlflow.db", elsewhere / "mlflow.db")
        on_disk.variables |= {
            "STILLROOM_HOME": str(elsewhere),
            "STILLROOM_STORE": (disk / "home" / "store").as_uri(),
        }
        _remount(disk, "ro")
        words = ("cannot be written", "Read-only file system", "STILLROOM_STORE")
        assert_refused(on_disk.compress(), *words)
        assert on_disk.versions() == 0
        assert_sound(on_disk)
        # What is there already can be read all the same.
        assert on_disk.type("store", "ls").stdout.count("\n") == before + 2
        _remount(disk, "rw")
        assert_done(on_disk.compress(), FIRST_STAGES)

    def test_a_read_only_home(self, on_disk: Terminal, disk: Path) -> None:
        _remount(disk, "ro")
        assert_refused(on_disk.compress(), "ead-only", "STILLROOM_HOME")
        _remount(disk, "rw")
        assert_sound(on_disk)

    def test_a_read_only_home_without_a_server(self, on_disk: Terminal, disk: Path) -> None:
        del on_disk.variables["PREFECT_API_URL"]
        _remount(disk, "ro")
        assert_refused(on_disk.compress(), "ead-only", "STILLROOM_HOME")


@pytest.mark.integration
def test_a_server_that_does_not_answer(tmp_path: Path, recipe: Recipe, parts: Path) -> None:
    nobody = {"STILLROOM_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    terminal = Terminal(tmp_path, nobody)
    for part in parts.iterdir():
        (tmp_path / part.name).symlink_to(part)
    terminal.write(recipe)
    assert_refused(terminal.compress(), "Prefect's server does not answer", "127.0.0.1:9")


def test_a_python_below_3_11(tmp_path: Path) -> None:
    """A Python of that age answers the Makefile's question as the real one would."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    # The question itself is asked by a Python that says of itself that it is 3.10.
    old = tmp_path / "python3.10"
    pretend = "import collections, sys; V = collections.namedtuple('V', 'major minor micro'); "
    old.write_text(
        "#!/bin/sh\n"
        f'exec python3 -c "{pretend}sys.version_info = V(3, 10, 14); '
        'exec(sys.argv[2])" "$@"\n'
    )
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"PYTHON={old}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "Stillroom needs" in line]
    assert "Stillroom needs Python 3.11 or later; 3.10 came" in line
    assert "make PYTHON=python3.11 demo" in line
    assert not (tmp_path / ".venv").exists()


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


def _other_tokenizer(teacher: Path, folder: Path) -> None:
    """Copy a model whose tokenizer numbers two of its letters the other way round."""
    folder.mkdir()
    for file in teacher.iterdir():
        content = file.read_bytes()
        if file.name == "tokenizer.json":
            content = content.replace(b'"a": 5', b'"a": 6').replace(b'"b": 6', b'"b": 5', 1)
            assert content != file.read_bytes()
        (folder / file.name).write_bytes(content)


def _remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
