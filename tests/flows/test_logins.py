"""With a password: who is let in, what runs all the same, and where no secret is ever written."""

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from tests.flows.house import (
    SHORT,
    House,
    open_house,
    processes_of,
    short_recipe,
    start,
    write_settings,
)
from tests.flows.terminal import Terminal, assert_done, assert_refused
from tests.servers import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.service]

USER, PASSWORD = "ann", "planted%pass#word$1"
KEY_ID, SECRET_KEY, ENDPOINT_PASSWORD, TOKEN = (
    "PLANTEDKEYID00000001",
    "/planted+secret/key0123456789",
    "planted-endpoint-password",
    "planted-hub-token",
)
SECRETS = [PASSWORD, KEY_ID, SECRET_KEY, ENDPOINT_PASSWORD, TOKEN]
BUCKET, PREFIX = "locked", "some/prefix"
PUBLIC = ("/health", "/ready", "/static", "/favicon.ico", "/mlflow/server-info", "/version")


@pytest.fixture(scope="module")
def bucket(mock_s3: S3Server) -> Iterator[Any]:
    """A bucket for everything that is made, on a server that takes any credentials."""
    import boto3

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=mock_s3.endpoint,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    yield client
    client.close()


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, mock_s3: S3Server, bucket: Any
) -> Iterator[House]:
    """Servers that ask for a password, which stands in a settings file."""
    terminal = open_house(tmp_path_factory.mktemp("locked"))
    host = mock_s3.endpoint.removeprefix("http://")
    terminal.variables |= {
        "STILLROOM_STORE": f"s3://{BUCKET}/{PREFIX}",
        "STILLROOM_DATA_ROOTS": str(parts),
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL_S3": f"http://someone:{ENDPOINT_PASSWORD}@{host}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HF_TOKEN": TOKEN,
    }
    write_settings(terminal, f"STILLROOM_USER={USER}\nSTILLROOM_PASSWORD='{PASSWORD}'\n")
    terminal.write(short_recipe(parts))
    try:
        yield start(terminal, (USER, PASSWORD))
    finally:
        done = terminal.type("down")
        assert done.returncode == 0, done.stdout + done.stderr
        assert processes_of(terminal.home) == []


@pytest.fixture(scope="module")
def ordered(locked: House, parts: Path) -> dict[str, Any]:
    """A run that was ordered with the login, and is done."""
    return locked.make(short_recipe(parts))


def test_prefect_lets_nobody_in_without_the_login(locked: House) -> None:
    schema = httpx.get(f"{locked.prefect}/api/openapi.json", auth=locked.login, timeout=60).json()
    asked = 0
    with httpx.Client(timeout=60) as client:
        for path, methods in schema["paths"].items():
            filled = path.replace("{", "").replace("}", "")
            if filled.endswith(PUBLIC):
                continue
            for method in methods:
                answer = client.request(method, f"{locked.prefect}/api{filled}")
                assert answer.status_code == 401, (method, path, answer.text[:200])
                asked += 1
        assert asked > 150
        wrong = client.get(f"{locked.prefect}/api/admin/version", auth=(USER, PASSWORD[:-1]))
        assert wrong.status_code == 401
    assert locked.ask("GET", "/admin/version")


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out"])
def test_prefect_streams_nothing_without_the_login(locked: House, path: str) -> None:
    address = f"{locked.prefect.replace('http', 'ws', 1)}/api/{path}"

    async def listen() -> None:
        async with websockets.connect(address, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            await socket.send(json.dumps({"type": "auth", "token": None}))
            answer = json.loads(await asyncio.wait_for(socket.recv(), 30))
            assert answer["type"] == "auth_failure", answer
            await asyncio.wait_for(socket.recv(), 30)

    with pytest.raises(websockets.ConnectionClosed):
        asyncio.run(listen())


def test_mlflow_lets_nobody_in_without_the_login(locked: House) -> None:
    routes = _mlflow_routes()
    assert len(routes) > 150
    with httpx.Client(timeout=60) as client:
        for method, path in routes:
            if any(path.startswith(each) or path.endswith(each) for each in PUBLIC):
                continue
            answer = client.request(method, f"{locked.mlflow}{path}")
            assert answer.status_code in (401, 403), (method, path, answer.text[:200])
        url = f"{locked.mlflow}/api/2.0/mlflow/experiments/search"
        query = {"max_results": 1}
        assert client.get(url, params=query, auth=(USER, "password1234")).status_code == 401
        assert client.get(url, params=query, auth=locked.login).status_code == 200
        foreign = client.get(url, params=query, headers={"Host": "evil.example.org"})
        assert foreign.status_code == 403


def _mlflow_routes() -> list[tuple[str, str]]:
    """Return methods and paths of MLflow's server; an import of it warns, so not in here."""
    ask = """
import json, re, warnings
warnings.simplefilter("ignore")
from mlflow.server import app
from mlflow.server.fastapi_app import create_fastapi_app
routes = {(m, re.sub("<[^>]*>", "1", r.rule)) for r in app.url_map.iter_rules() for m in r.methods}
routes |= {(m, re.sub("{[^}]*}", "1", r.path)) for r in create_fastapi_app(app).routes
           for m in getattr(r, "methods", None) or ()}
print(json.dumps(sorted(each for each in routes if each[0] not in ("HEAD", "OPTIONS"))))
"""
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return [(method, path) for method, path in json.loads(done.stdout.splitlines()[-1])]


def test_scripts_of_foreign_pages_are_not_let_in(locked: House) -> None:
    asks = {"Origin": "https://evil.example.org", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{locked.prefect}/api/flow_runs/filter", headers=asks, timeout=60)
    assert "access-control-allow-origin" not in answer.headers
    page = httpx.get(f"{locked.prefect}/ui-settings", timeout=60)
    assert page.json()["api_url"] == "/api"
    assert page.json()["auth"] == "BASIC"


def test_a_run_ordered_with_the_login_registers(locked: House, ordered: dict[str, Any]) -> None:
    expected = [*SHORT, "check gates", "register", "write report"]
    assert locked.states(ordered["id"]) == dict.fromkeys(expected, "Completed")
    found = locked.ask_mlflow("GET", "/registered-models/alias", name="tiny", alias="champion")
    assert found["model_version"]["status"] == "READY"


def test_a_terminal_needs_no_more_than_the_settings_file(
    locked: House, ordered: dict[str, Any]
) -> None:
    assert_done(locked.terminal.compress(), tuple(SHORT))
    assert locked.terminal.type("store", "gc", "--dry-run").returncode == 0


def test_a_consumer_pulls_with_mlflows_own_variables(
    locked: House, ordered: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "stillroom.cli", "pull", "models:/tiny@champion"]
    environment = locked.terminal.environment() | {"MLFLOW_TRACKING_URI": locked.mlflow}
    login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}

    def pull(folder: Path, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, str(folder)],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    refused = pull(tmp_path / "none", {})
    assert refused.returncode == 2, refused.stderr
    assert "MLFLOW_TRACKING_USERNAME" in refused.stderr
    assert not (tmp_path / "none").exists()
    done = pull(tmp_path / "pulled", login)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pulled" / "config.json").exists()


def test_a_terminal_without_the_login_is_refused_in_a_line(locked: House, tmp_path: Path) -> None:
    stranger = Terminal(tmp_path, {"STILLROOM_HOME": str(tmp_path / "home")})
    stranger.variables["PREFECT_API_URL"] = f"{locked.prefect}/api"
    (tmp_path / "recipe.yaml").write_text((locked.terminal.folder / "recipe.yaml").read_text())
    assert_refused(stranger.compress(), "refuses the login", "STILLROOM_PASSWORD")


def test_a_recipe_with_a_login_in_it_is_not_kept(locked: House, parts: Path) -> None:
    recipe = short_recipe(parts)
    recipe["data"]["train"]["source"] = f"s3://ann:{ENDPOINT_PASSWORD}@missing/text"
    answer = locked.order(recipe)
    assert 400 <= answer.status_code < 500, answer.text


def test_no_secret_is_written_anywhere(locked: House, ordered: dict[str, Any], bucket: Any) -> None:
    terminal = locked.terminal
    # A stage whose error quotes one secret, and a run whose error quotes another.
    telling = Terminal(terminal.folder, dict(terminal.variables))
    telling.variables["STILLROOM_SCRATCH"] = f"/proc{SECRET_KEY}"
    stage = assert_refused(telling.compress("--set", "quantization.bits=8"), "quantize: no work")
    telling.variables["AWS_ENDPOINT_URL_S3"] = f"http://someone:{ENDPOINT_PASSWORD}@127.0.0.1:9"
    telling.variables["STILLROOM_S3_TIMEOUT"] = "1"
    whole = assert_refused(telling.compress(), "http://***@127.0.0.1:9/")
    failed = {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}}
    said = [run["state"]["message"] for run in locked.ask("POST", "/flow_runs/filter", failed)]
    assert len(said) == 2, said
    assert all("***" in each for each in [stage, whole, *said]), said

    shown = json.dumps([said, _command_lines(), locked.ask("POST", "/logs/filter", {})])
    assert _found(shown.encode()) == []
    leaks = {
        str(path): found
        for path in terminal.folder.rglob("*")
        if path.is_file() and path.name != "settings.env"
        if (found := _found(path.read_bytes()))
    }
    assert leaks == {}
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    assert any(key.startswith(f"{PREFIX}/mlflow/") for key in keys)
    assert all(
        _found(bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read()) == [] for key in keys
    )


def test_the_search_finds_what_is_there(locked: House) -> None:
    settings = (locked.terminal.home / "settings.env").read_bytes()
    assert _found(settings) == [PASSWORD]
    assert _found(base64.b64encode(f"{USER}:{PASSWORD}".encode())) == [PASSWORD]
    assert (locked.terminal.home / "prefect" / "prefect.db").stat().st_size > 0
    for name in ("mlflow-auth.ini", "mlflow-auth.db", "mlflow-secret-key"):
        assert (locked.terminal.home / name).stat().st_mode & 0o777 == 0o600


def _found(content: bytes) -> list[str]:
    """Return the secrets that stand in some bytes: as they are, as JSON has them, or encoded."""
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    return [
        secret
        for secret in SECRETS
        if secret.encode() in content
        or json.dumps(secret)[1:-1].encode() in content
        or (secret == PASSWORD and login in content)
    ]


def _command_lines() -> list[str]:
    import psutil

    return [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
