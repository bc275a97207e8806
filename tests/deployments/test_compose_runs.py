"""What compose.yaml says, run for real: its commands, variables and health checks as processes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments.composed import DEPLOYMENTS, SECRETS
from tests.deployments.plain import Machine, machine
from tests.flows.house import OVER, small_recipe
from tests.servers import Postgres, postgres_server, rgw_is_installed

RUN_SECONDS = 600
LOGIN = ("stillroom", SECRETS["STILLROOM_PASSWORD"])

pytestmark = [pytest.mark.integration, pytest.mark.service, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL as its image leaves it: a user, a first database, and databases.sql."""
    with postgres_server(SECRETS["POSTGRES_PASSWORD"]) as server:
        password = SECRETS["POSTGRES_PASSWORD"]
        role = f"create role stillroom superuser login password '{password}'"
        server.run("psql", "--command", role)
        server.run("createdb", "--owner=stillroom", "prefect")
        server.run("psql", "--file", str(DEPLOYMENTS / "images" / "databases.sql"))
        yield server


@pytest.fixture(scope="module")
def up(
    postgres: Postgres,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    parts: Path,
) -> Iterator[Machine]:
    s3 = request.getfixturevalue("ceph" if rgw_is_installed() else "mock_s3")
    secrets = SECRETS | {"S3_ACCESS_KEY": s3.access_key, "S3_SECRET_KEY": s3.secret_key}
    made = machine(tmp_path_factory.mktemp("machine"), secrets, s3.endpoint, postgres.port, parts)
    with made.up("prefect", "mlflow"):
        done = made.run("set-up", made.services["set-up"]["command"])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "made the bucket stillroom" in done.stdout
        with made.up("worker-cpu"):
            yield made


def test_postgres_is_healthy_by_its_own_check(postgres: Postgres) -> None:
    from tests.deployments.composed import services

    kind, program, *options = services()["postgres"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "pg_isready")
    postgres.run(program, *options)


def test_nobody_gets_in_without_the_password(up: Machine) -> None:
    prefect, mlflow = up.here("http://prefect:4200"), up.here("http://mlflow:5000")
    experiments = f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    for login in (None, ("stillroom", "guessed"), ("admin", "password1234")):
        assert httpx.post(f"{prefect}/api/flows/filter", json={}, auth=login).status_code == 401
        assert httpx.get(experiments, auth=login).status_code == 401
    assert httpx.post(f"{prefect}/api/flows/filter", json={}, auth=LOGIN).status_code == 200
    assert httpx.get(experiments, auth=LOGIN).status_code == 200
    foreign = httpx.get(experiments, auth=LOGIN, headers={"Host": "elsewhere.test"})
    assert foreign.status_code == 403


def test_set_up_made_everything_and_again_changes_nothing(up: Machine) -> None:
    before = _there(up)
    assert {"stillroom-cpu", "stillroom-gpu"} <= set(before["work_pools"])
    assert {"compress", "ask-teacher"} <= set(before["deployments"])
    assert before["automations"] == ["stillroom-lost-runs", "stillroom-unstarted-runs"]
    named = "deployments/name/compress-named/compress-named"
    deployment = _ask(up, "GET", named)
    path = f"deployments/{deployment['id']}/schedules/{deployment['schedules'][0]['id']}"
    _ask(up, "PATCH", path, {"active": True})
    done = up.run("set-up", up.services["set-up"]["command"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "made the bucket" not in done.stdout
    assert _there(up) == before
    assert _ask(up, "GET", named)["schedules"][0]["active"] is True


def test_a_pool_of_a_cluster_takes_its_template(up: Machine) -> None:
    template = DEPLOYMENTS / "kubernetes" / "gpu-job.json"
    command = ["prefect", "--no-prompt", "work-pool", "create", "a-cluster", "--type", "kubernetes"]
    done = up.run("set-up", [*command, "--base-job-template", str(template)])
    assert done.returncode == 0, done.stdout + done.stderr
    pool = _ask(up, "GET", "work_pools/a-cluster")
    assert pool["type"] == "kubernetes"
    assert pool["base_job_template"]["variables"]["properties"]["gpus"]["default"] == 1


def test_a_run_is_made_and_registered(up: Machine, recipe: dict[str, Any], parts: Path) -> None:
    small = small_recipe(recipe, parts) | {"adapters": [], "distillation": None}
    body = {"parameters": {"recipe": small}}
    run = _ask(up, "POST", f"deployments/{_compress(up)['id']}/create_flow_run", body)["id"]
    deadline = time.monotonic() + RUN_SECONDS
    while (state := _ask(up, "GET", f"flow_runs/{run}")["state"])["type"] not in OVER:
        assert time.monotonic() < deadline, f"{state}\n{up.log('worker-cpu')}"
        time.sleep(1)
    assert state["name"] == "Completed", f"{state}\n{up.log('worker-cpu')}"
    answer = httpx.get(
        f"{up.here('http://mlflow:5000')}/api/2.0/mlflow/registered-models/alias",
        params={"name": "tiny", "alias": "champion"},
        auth=LOGIN,
    )
    assert answer.json()["model_version"]["source"].startswith("s3://stillroom/mlflow/")
    listed = up.run("worker-cpu", ["python", "-m", "flows", "store", "verify"])
    assert "s3://stillroom/store is sound" in listed.stdout, listed.stderr


def test_no_secret_is_in_the_logs(up: Machine) -> None:
    assert {log.name for log in up.logs.iterdir()} == {"prefect", "mlflow", "worker-cpu"}
    # The other half of a login, which may be a word of any text.
    secrets = {name: text for name, text in up.secrets.items() if name != "S3_ACCESS_KEY"}
    for log in up.logs.iterdir():
        text = log.read_text()
        assert not [name for name, secret in secrets.items() if secret in text], log.name


def _ask(up: Machine, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    url = f"{up.here('http://prefect:4200')}/api/{path}"
    answer = httpx.request(method, url, json=body, auth=LOGIN, timeout=60)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def _there(up: Machine) -> dict[str, list[str]]:
    kinds = ("work_pools", "deployments", "automations")
    return {
        kind: sorted(each["name"] for each in _ask(up, "POST", f"{kind}/filter", {}))
        for kind in kinds
    }


def _compress(up: Machine) -> dict[str, Any]:
    found: dict[str, Any] = _ask(up, "GET", "deployments/name/compress/compress")
    return found
