"""A team's set-up on one machine: PostgreSQL under both servers, logins, Ceph as the store."""

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import House, open_house, processes_of, start
from tests.flows.many import MANY, order_many
from tests.flows.terminal import assert_done
from tests.flows.test_logins import SHORT, short_recipe, write_settings
from tests.servers import POSTGRES_PROGRAMS, Postgres, S3Server, postgres_server, rgw_is_installed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.service,
    pytest.mark.skipif(not POSTGRES_PROGRAMS, reason="Debian's PostgreSQL is not installed"),
    pytest.mark.skipif(not rgw_is_installed(), reason="Ceph's radosgw is not installed"),
]

USER, PASSWORD = "ann", "planted%pass#word$1"
DATABASE_PASSWORD = "planted%data/base password@1"
CRON_SECONDS = 240
LOAD = """
import sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(len(model.predict(["the cat sat", "a mat"], params={"max_new_tokens": 2})))
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server(DATABASE_PASSWORD) as server:
        for name in ("prefect", "mlflow"):
            server.run("createdb", name)
        yield server


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, postgres: Postgres, ceph: S3Server
) -> Iterator[House]:
    """What `make up` starts from one settings file; credentials of S3 are in the environment."""
    terminal = open_house(tmp_path_factory.mktemp("team"))
    bucket = f"team-{uuid.uuid4().hex[:12]}"
    terminal.variables |= {
        "STILLROOM_HOST": "127.0.0.2",  # as where other machines call: a name MLflow does not know
        "AWS_ACCESS_KEY_ID": ceph.access_key,
        "AWS_SECRET_ACCESS_KEY": ceph.secret_key,
        "AWS_ENDPOINT_URL_S3": ceph.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _make_bucket(bucket, terminal.variables)
    settings = {
        "STILLROOM_USER": USER,
        "STILLROOM_PASSWORD": PASSWORD,
        "STILLROOM_PREFECT_DATABASE": postgres.address("prefect", "asyncpg"),
        "STILLROOM_MLFLOW_DATABASE": postgres.address("mlflow", "psycopg2"),
        "STILLROOM_STORE": f"s3://{bucket}/store",
        "STILLROOM_MLFLOW_ARTIFACTS": f"s3://{bucket}/mlflow",
        "STILLROOM_DATA_ROOTS": str(parts),
        "STILLROOM_RUNS_AT_ONCE": str(MANY),
    }
    lines = (f"{name}='{value}'\n" for name, value in settings.items())
    write_settings(terminal, "".join(lines))
    terminal.write(short_recipe(parts))
    try:
        yield start(terminal, (USER, PASSWORD))
    finally:
        assert terminal.type("down").returncode == 0
        assert processes_of(terminal.home) == []


def _make_bucket(name: str, login: dict[str, str]) -> None:
    import boto3

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=login["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=login["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=login["AWS_SECRET_ACCESS_KEY"],
        region_name=login["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=name)
    client.close()


@pytest.fixture(scope="module")
def ordered(team: House, parts: Path) -> dict[str, Any]:
    return team.make(short_recipe(parts))


def test_a_run_ordered_by_api(team: House, ordered: dict[str, Any], postgres: Postgres) -> None:
    finished = [*SHORT, "check gates", "register", "write report"]
    assert team.states(ordered["id"]) == dict.fromkeys(finished, "Completed")
    ask = ("--tuples-only", "--command")
    runs = postgres.run("psql", "prefect", *ask, "select state_name from flow_run")
    assert runs.split() == ["Completed"]
    versions = postgres.run("psql", "mlflow", *ask, "select name from model_versions")
    assert versions.split() == ["tiny"]
    users = postgres.run("psql", "mlflow", *ask, "select username from users where is_admin")
    assert users.split() == [USER]
    assert [path.name for path in team.terminal.home.rglob("*.db")] == []


def test_a_run_by_cron(team: House, ordered: dict[str, Any], parts: Path) -> None:
    deployment = team.deployment["id"]
    every_minute = {
        "schedule": {"cron": "* * * * *", "timezone": "UTC"},
        "active": True,
        "parameters": {"recipe": short_recipe(parts)},
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


@pytest.mark.timeout(600)
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
