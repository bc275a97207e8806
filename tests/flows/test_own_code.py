"""A teacher that its own code loads, through the whole road, where the recipe trusts that code."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.house import RECIPE, small_recipe
from tests.flows.terminal import Terminal, assert_done, assert_refused
from tests.stillroom.own_code import write_own_model

SERVE = """
import sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
trust = {"trust_remote_code": True} if sys.argv[2:] else {}
model = mlflow.pyfunc.load_model("models:/tiny@champion", model_config=trust)
served = model.unwrap_python_model().served
print(type(served.model).__name__, served.predict(["the cat"])["generated"][0])
"""
REFUSAL = "runs only where someone trusts it"


@pytest.fixture
def own(terminal: Callable[..., Terminal], parts: Path, tmp_path: Path) -> Terminal:
    """A terminal with the small recipe of such a teacher, which trusts it."""
    opened = terminal()
    # transformers keeps the code that it runs in a folder of the user's.
    opened.variables["HF_HOME"] = str(tmp_path / "hf")
    write_own_model(tmp_path / "own")
    recipe = small_recipe(RECIPE, parts)
    del recipe["adapters"]
    recipe["teacher"] = {"source": str(tmp_path / "own"), "trust_remote_code": True}
    opened.write(recipe)
    return opened


def serve(own: Terminal, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SERVE, f"sqlite:///{own.home / 'mlflow.db'}", *arguments],
        cwd=own.folder,
        env=own.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.integration
def test_its_student_is_quantized_registered_and_served(own: Terminal) -> None:
    assert_done(own.compress())
    refused = serve(own)
    assert refused.returncode != 0
    assert REFUSAL in refused.stderr
    served = serve(own, "trusted")
    assert served.returncode == 0, served.stderr
    assert served.stdout.startswith("OwnForCausalLM ")


@pytest.mark.integration
def test_its_code_is_not_run_unasked(own: Terminal) -> None:
    mark = own.folder / "ran"
    for file in (own.folder / "own").glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n{file.read_text()}")
    done = own.compress("--set", "teacher.trust_remote_code=false")
    assert REFUSAL in assert_refused(done, "import teacher")
    assert own.records("model") == []
    assert not mark.exists()
