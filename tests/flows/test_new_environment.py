"""What was registered, used by someone who has never seen this repository."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from stillroom.contents import list_files
from stillroom.models import load_model, load_tokenizer
from tests.flows.house import House

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ASK = """
import importlib.util, json, sys
for name in ("stillroom", "tasks", "flows", "tests"):
    assert importlib.util.find_spec(name) is None, name
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
import stillroom
answer = model.predict(["the cat sat", "a mat"], params={"max_new_tokens": 4})
print(json.dumps([stillroom.__file__, sys.prefix, answer.to_dict("list")]))
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment's Python.

    It finds the installed packages by a line in a .pth file. Python does not read the .pth files of
    a folder that it finds so: the editable install of this repository stays out of sight.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    packages = Path(done.stdout.strip())
    (packages / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("name", ["tiny", "tiny-law"])
def test_registered_model_answers_in_a_new_environment(
    house: House, ordered: dict[str, Any], elsewhere: Path, tmp_path: Path, name: str
) -> None:
    done = subprocess.run(
        [elsewhere, "-c", ASK, house.mlflow, f"models:/{name}@champion"],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, prefix, answer = json.loads(done.stdout.splitlines()[-1])
    assert prefix == str(elsewhere.parents[1])
    assert file.endswith("/code/stillroom/__init__.py")  # the one that the version carries
    (column,) = answer.values()
    assert len(column) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_pulled_from_the_running_server(
    house: House, ordered: dict[str, Any], tmp_path: Path, merged: bool
) -> None:
    target = tmp_path / "here"
    command = [Path(sys.executable).with_name("stillroom"), "pull", "models:/tiny-law@champion"]
    done = subprocess.run(
        [*command, target, *(["--merged"] if merged else [])],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": house.mlflow},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verified" in done.stdout
    if merged:
        load_model(target)
        load_tokenizer(target)
        assert "adapter_config.json" not in {file.path for file in list_files(target)}
        return
    base = house.terminal.records("model")
    pulled = {file.sha256 for file in list_files(target / "base")}
    assert pulled in [{file.sha256 for file in record.files} for record in base]
    load_model(target / "base", weights="packed")
