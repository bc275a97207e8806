"""Run a module in Triton's interpreter, which a process chooses before it imports triton."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def interpreted(module: str) -> Any:
    """Return the JSON that `python -m module` prints in the interpreter."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "compression"), str(ROOT), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-m", module],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("the interpreter of this Triton (3.6) does not work with NumPy 2.4")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
