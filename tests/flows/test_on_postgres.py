"""A tiny recipe end to end in a team's set-up, its stages in the GPU pool, by API and by cron."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import SHORT, House
from tests.flows.many import order_many
from tests.flows.team import NEEDS, PASSWORD, USER, sent
from tests.flows.terminal import assert_done
from tests.servers import Postgres

pytestmark = [pytest.mark.integration, pytest.mark.service, *NEEDS]

CRON_SECONDS = 240
LOAD = """
import sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(len(model.predict(["the cat sat", "a mat"], params={"max_new_tokens": 2})))
"""


@pytest.fixture(scope="module")
def ordered(team: House, parts: Path) -> dict[str, Any]:
    return team.make(sent(parts))


def test_a_run_ordered_by_api(team: House, ordered: dict[str, Any], postgres: Postgres) -> None:
    finished = [*SHORT, "check gates", "register", "write report"]
    # Beside these stand the stages' runs in the GPU pool, by their own names.
    assert team.states(ordered["id"]).items() >= dict.fromkeys(finished, "Completed").items()
    ask = ("--tuples-only", "--no-align", "--command")
    runs = postgres.run("psql", "prefect", *ask, "select name, state_name from flow_run")
    for title in ("tiny", "quantize", "evaluate teacher"):  # the flow, and stages in the GPU pool
        assert f"{title}|Completed" in runs.splitlines(), runs
    versions = postgres.run("psql", "mlflow", *ask, "select name from model_versions")
    assert "tiny" in versions.split()
    users = postgres.run("psql", "mlflow", *ask, "select username from users where is_admin")
    assert users.split() == [USER]
    assert [path.name for path in team.terminal.home.rglob("*.db")] == []


def test_a_run_by_cron(team: House, ordered: dict[str, Any], parts: Path) -> None:
    deployment = team.deployment["id"]
    every_minute = {
        "schedule": {"cron": "* * * * *", "timezone": "UTC"},
        "active": True,
        "parameters": {"recipe": sent(parts)},
    }
    (made,) = team.ask("POST", f"/deployments/{deployment}/schedules", [every_minute])
    try:
        run = _first_scheduled(team)
    finally:
        schedule = f"/deployments/{deployment}/schedules/{made['id']}"
        team.ask("DELETE", schedule)
    ended = team.await_end(run["id"])
    assert ended["state"]["name"] == "Completed", f"{ended['state']}\n{team.log('worker')}"
    assert ended["auto_scheduled"] is True
    states = team.states(ended["id"])
    assert {states[stage] for stage in SHORT} == {"Cached"}


def _first_scheduled(team: House) -> dict[str, Any]:
    """Return the first run that the clock has started."""
    started = {"state": {"type": {"any_": ["RUNNING", "COMPLETED", "FAILED", "CRASHED"]}}}
    deadline = time.monotonic() + CRON_SECONDS
    while True:
        runs = team.ask("POST", "/flow_runs/filter", {"flow_runs": started})
        for run in runs:
            if run["auto_scheduled"]:
                found: dict[str, Any] = run
                return found
        assert time.monotonic() < deadline, team.log("worker")
        time.sleep(1)


def test_the_champion_loads(team: House, ordered: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "models:/tiny@champion"],
        cwd=tmp_path,
        env=team.terminal.environment()
        | {
            "MLFLOW_TRACKING_URI": team.mlflow,
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "PYTHONPATH": "",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


def test_a_terminal_finds_what_was_made(team: House, ordered: dict[str, Any]) -> None:
    assert_done(team.terminal.compress(), tuple(SHORT))


@pytest.mark.alone
@pytest.mark.timeout(900)
def test_many_runs_at_once_all_end_well(team: House, recipe: dict[str, Any], parts: Path) -> None:
    order_many(team, recipe, parts, seed=82)


def test_no_password_lies_in_the_home_or_in_a_database(
    team: House, ordered: dict[str, Any], postgres: Postgres
) -> None:
    home = team.terminal.home
    private = {"settings.env", "mlflow-auth.ini"}
    for path in (each for each in home.rglob("*") if each.is_file()):
        if path.name in private:
            assert path.stat().st_mode & 0o777 == 0o600
        else:
            content = path.read_bytes()
            assert PASSWORD.encode() not in content, path
            assert b"planted%data" not in content, path
            assert b"planted%25data" not in content, path
    for name in ("prefect", "mlflow"):
        dump = postgres.run("pg_dump", "--inserts", name)
        assert "tiny" in dump
        assert "planted%" not in dump
