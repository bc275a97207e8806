"""A tiny recipe end to end in a team's set-up, its stages in the GPU pool, by API and by cron."""

import json
import os
import subprocess
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import SHORT, House
from tests.flows.many import order_many
from tests.flows.team import NEEDS, PASSWORD, USER, sent
from tests.flows.terminal import assert_done
from tests.servers import Postgres, S3Server

pytestmark = [pytest.mark.integration, pytest.mark.service, *NEEDS]

CRON_SECONDS = 240
READER, READER_PASSWORD = "rob", "reads and no more"
REQUIREMENTS = """
import mlflow
print(mlflow.pyfunc.get_model_dependencies("models:/tiny@champion"))
"""
LOAD = """
import importlib.util
import mlflow
assert importlib.util.find_spec("stillroom") is None
model = mlflow.pyfunc.load_model("models:/tiny@champion")
print(len(model.predict(["the cat sat", "a mat"], params={"max_new_tokens": 2})))
"""
WRITE = """
import urllib.parse
import boto3, botocore, mlflow
client = mlflow.MlflowClient()
source = client.get_model_version_download_uri("tiny", "1")
bucket = urllib.parse.urlparse(source).netloc
try:
    boto3.client("s3").put_object(Bucket=bucket, Key="new", Body=b"")
except botocore.exceptions.ClientError as error:
    print(error.response["Error"]["Code"])
try:
    client.set_registered_model_alias("tiny", "mine", "1")
except mlflow.exceptions.MlflowException as error:
    print(error.error_code)
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


@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_a_reader_loads_the_champion_in_a_new_environment(
    team: House, ordered: dict[str, Any], ceph: S3Server, tmp_path: Path
) -> None:
    """Who may read, and no more, has what pip installs and nothing of this project."""
    let_read(team, ceph)
    reader = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "MLFLOW_TRACKING_URI": team.mlflow,
        "MLFLOW_TRACKING_USERNAME": READER,
        "MLFLOW_TRACKING_PASSWORD": READER_PASSWORD,
        "AWS_ENDPOINT_URL_S3": ceph.endpoint,
        "AWS_ACCESS_KEY_ID": ceph.other_access_key,
        "AWS_SECRET_ACCESS_KEY": ceph.other_secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")

    def run(*command: str) -> str:
        done = subprocess.run(
            [python, *command], cwd=tmp_path, env=reader, capture_output=True, text=True,
            check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    run("-m", "pip", "install", "--quiet", "mlflow", "boto3")
    requirements = run("-c", REQUIREMENTS).splitlines()[-1]
    run("-m", "pip", "install", "--quiet", "--requirement", requirements)
    assert run("-c", LOAD).split()[-1] == "2"
    assert run("-c", WRITE).split() == ["AccessDenied", "PERMISSION_DENIED"]


def let_read(team: House, s3: S3Server) -> None:
    """Give the reader a login at MLflow, and the right to read all buckets of S3's owner."""
    import boto3

    login = {"username": READER, "password": READER_PASSWORD}
    team.ask_mlflow("POST", "/users/create", login)
    owner = boto3.session.Session(s3.access_key, s3.secret_key).client(
        "s3", endpoint_url=s3.endpoint, region_name="us-east-1"
    )
    for bucket in (each["Name"] for each in owner.list_buckets()["Buckets"]):
        policy = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": [f"arn:aws:iam:::user/{s3.other_access_key}"]},
                    "Action": ["s3:GetObject", "s3:ListBucket"],
                    "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
                }
            ],
        }
        owner.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    owner.close()


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
