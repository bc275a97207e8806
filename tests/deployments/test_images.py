"""The Dockerfiles, without an engine: what they copy, and what they run, in a folder."""

import fnmatch
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.deployments.composed import instructions, run_lines
from tests.flows.terminal import ROOT

HERE = Path(sys.executable).parent
IMAGES = ROOT / "deployments" / "images"
DOCKERFILES = [IMAGES / "cpu.Dockerfile", IMAGES / "cuda.Dockerfile"]
# These change the machine: their syntax is all that is looked at.
OF_THE_SYSTEM = ("apt-get ", "useradd ")

each_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.stem)


@each_image
def test_it_runs_as_nobody_in_particular_and_holds_no_secret(dockerfile: Path) -> None:
    words = instructions(dockerfile)
    assert ("USER", "stillroom") in words
    after_user = [word for word, _ in words[words.index(("USER", "stillroom")) :]]
    assert "RUN" not in after_user
    assert "COPY" not in after_user
    assert not any(name in dockerfile.read_text() for name in ("PASSWORD", "SECRET", "TOKEN="))
    bases = [rest for word, rest in words if word == "FROM"]
    assert bases == ["python:3.11-slim-bookworm"]


def test_both_images_differ_in_what_a_gpu_needs_alone() -> None:
    cpu, cuda = (set(instructions(file)) for file in DOCKERFILES)
    assert cpu <= cuda
    (apt, devices) = sorted(rest for _, rest in cuda - cpu)
    assert apt.startswith("NVIDIA_") or apt.startswith("apt-get")
    assert {apt.split()[0].split("=")[0], devices.split()[0].split("=")[0]} == {
        "NVIDIA_VISIBLE_DEVICES",
        "apt-get",
    }


@each_image
def test_commands_are_sound_shell(dockerfile: Path) -> None:
    lines = run_lines(dockerfile)
    assert lines
    for line in lines:
        subprocess.run(["sh", "-n", "-c", line], check=True)


# The other image has the same, and more: see above.
@pytest.mark.service
def test_pip_finds_all_that_is_asked_for(tmp_path: Path) -> None:
    copied = _copy(DOCKERFILES[0], tmp_path)
    for line in _pip_lines(DOCKERFILES[0]):
        # What is installed here is of the same versions, so there is little left to look for.
        _run(f"{line} --dry-run --quiet", copied)


@pytest.mark.service
def test_the_project_installs_itself(tmp_path: Path) -> None:
    copied = _copy(DOCKERFILES[0], tmp_path / "image")
    venv.create(tmp_path / "venv", with_pip=True)
    (line,) = [line for line in _pip_lines(DOCKERFILES[0]) if "'.[" in line]
    _run(f"{line} --no-deps --quiet", copied, tmp_path / "venv" / "bin")
    (package,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages/stillroom")
    assert (package / "cli.py").is_file()


@pytest.mark.service
def test_what_is_copied_suffices(tmp_path: Path) -> None:
    copied = _copy(DOCKERFILES[0], tmp_path)
    flows = sorted(file.stem for file in (ROOT / "flows").glob("*.py") if file.stem != "__main__")
    imports = ", ".join(
        [*(f"flows.{name}" for name in flows), "tasks.servers.set_up", "tasks.fork_server"]
    )
    code = f"import sys; sys.path[:0] = [{str(copied)!r}]; import {imports}; print(flows.__file__)"
    said = _run(f'python -W ignore -P -c "{code}"', copied, PYTHONPATH=str(copied / "compression"))
    assert str(copied) in said
    assert "usage:" in _run("python -m flows --help", copied, PYTHONPATH=str(copied))


def test_no_secret_and_no_data_get_into_an_image(tmp_path: Path) -> None:
    ignored = [".git", ".venv", ".stillroom", "tests", "benchmarks", "deployments/.env"]
    for name in [*ignored, "deployments/data/text.jsonl", "tasks/__pycache__/x.pyc", "x.env"]:
        assert not _is_sent(name), name
    for name in ["tasks/servers/services.py", "deployments/recipes/demo.yaml", "constraints.txt"]:
        assert _is_sent(name), name


def _pip_lines(dockerfile: Path) -> list[str]:
    lines = [line for line in run_lines(dockerfile) if not line.startswith(OF_THE_SYSTEM)]
    assert all(line.startswith("pip install ") for line in lines)
    return lines


def _copy(dockerfile: Path, folder: Path) -> Path:
    """Fill a folder as the image's working directory is filled."""
    folder.mkdir(exist_ok=True)
    for source in [rest for word, rest in instructions(dockerfile) if word == "COPY"]:
        *names, target = source.split()
        for name in names:
            place = folder / target / name if target.endswith("/") else folder / target
            if (ROOT / name).is_file():
                assert _is_sent(name), name
                shutil.copyfile(ROOT / name, place)
            else:
                shutil.copytree(ROOT / name, place, ignore=_not_sent)
    return folder


def _not_sent(folder: str, names: list[str]) -> set[str]:
    at = Path(folder).relative_to(ROOT)
    return {name for name in names if not _is_sent(str(at / name))}


def _is_sent(name: str) -> bool:
    """Return whether .dockerignore lets a file through: the last pattern that fits decides."""
    sent = True
    ends = [str(Path(*Path(name).parts[: i + 1])) for i in range(len(Path(name).parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        tails = [part for end in ends for part in (end, Path(end).name)]
        found = tails if line.removeprefix("!").startswith("**/") else ends
        if any(fnmatch.fnmatchcase(each, pattern) for each in found):
            sent = line.startswith("!")
    return sent


def _run(line: str, folder: Path, programs: Path = HERE, **variables: str) -> str:
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout
