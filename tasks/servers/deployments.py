"""Bring the deployments of a Prefect server up to date, and leave what was set there."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from stillroom.errors import StillroomError
from tasks.servers.automations import Ask
from tasks.servers.variables import ROOT

DECLARED = ROOT / "deployments" / "prefect.yaml"


def deploy(api: str, environment: dict[str, str], ask: Ask) -> None:
    """Make the deployments of prefect.yaml, or bring them up to date.

    Of one that is there stay the schedules, as they are, the default parameters, the variables of
    its jobs, and the limit of runs at once: they are its operator's.

    Raises:
        StillroomError: Prefect refuses one.
    """
    declared = yaml.safe_load(DECLARED.read_text())
    there = _there(api, [each["name"] for each in declared["deployments"]], ask)
    declared["deployments"] = [
        _kept(each, there[each["name"]])
        if each["name"] in there and there[each["name"]]["entrypoint"] == each["entrypoint"]
        else each
        for each in declared["deployments"]
    ]
    with TemporaryDirectory(prefix="stillroom-") as scratch:
        file = Path(scratch) / "prefect.yaml"
        file.write_text(yaml.safe_dump(declared, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        done = subprocess.run(
            [*command, "--prefect-file", str(file)],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise StillroomError(f"prefect deploy failed: {(done.stdout + done.stderr)[-800:]}")


def _there(api: str, names: list[str], ask: Ask) -> dict[str, dict[str, Any]]:
    answer = ask("POST", f"{api}/deployments/filter", {"deployments": {"name": {"any_": names}}})
    answer.raise_for_status()
    return {each["name"]: each for each in answer.json()}


def _kept(declared: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Return a declaration without schedules, which leaves them, and with what was set there."""
    kept = {name: value for name, value in declared.items() if name != "schedules"}
    kept["parameters"] = there["parameters"] | declared.get("parameters", {})
    kept["work_pool"] = declared["work_pool"] | {"job_variables": there["job_variables"]}
    limit, options = there["global_concurrency_limit"], there["concurrency_options"] or {}
    if limit is not None:
        kept["concurrency_limit"] = {"limit": limit["limit"], **options}
    return kept
