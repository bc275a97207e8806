"""The layout that everything else rests on."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_compression_is_a_folder_not_a_package() -> None:
    # From Python 3.14 on the standard library owns a package `compression`, which gzip and bz2
    # import: one of that name at the root would break the interpreter.
    assert not (ROOT / "compression" / "__init__.py").exists()


def test_no_flow_or_task_file_shadows_a_library() -> None:
    # Prefect puts the folder of a flow's file on sys.path.
    libraries = {"evaluate", "datasets", "adapters", "peft", "mlflow", "torch", "prefect", "boto3"}
    names = {path.stem for folder in ("flows", "tasks") for path in (ROOT / folder).iterdir()}
    assert not names & libraries


@pytest.mark.slow
def test_the_wheel_holds_only_stillroom(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"stillroom", wheel.name.split("-py3")[0] + ".dist-info"}
    assert any(name.endswith("report.html.j2") for name in names)


@pytest.mark.parametrize(
    "command",
    [["-m", "flows", "--help"], ["-m", "flows", "schema"], ["-m", "stillroom.cli", "--help"]],
)
def test_commands_that_need_no_torch_do_not_load_it(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "prefect", "mlflow", "boto3"}
