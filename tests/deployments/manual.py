"""The blocks of OPERATING.md, to be run as they stand."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.flows.terminal import ROOT

MANUAL = ROOT / "deployments" / "OPERATING.md"


def block(title: str) -> str:
    """Return the commands of the block whose first line is this comment."""
    blocks = re.findall(r"```bash\n# (.+)\n((?:.|\n)*?)```", MANUAL.read_text())
    (found,) = [commands for heading, commands in blocks if heading.split(",")[0] == title]
    return str(found)


def run_block(title: str, variables: Mapping[str, str], programs: Path | None = None) -> str:
    """Run the commands of a block as a user who has activated the environment."""
    path = [*([str(programs)] if programs else []), str(Path(sys.executable).parent)]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block(title)],
        cwd=ROOT,
        env=os.environ
        | {"PATH": ":".join([*path, os.environ["PATH"]]), "PYTHONPATH": str(ROOT / "compression")}
        | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
