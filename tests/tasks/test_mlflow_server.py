"""A real MLflow server and an S3 server, as a team would have them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from stillroom.contents import list_files
from stillroom.errors import ServiceUnreachableError
from stillroom.pull import pull
from tasks.registered import registered_keys
from tasks.registry import (
    champion,
    move_alias,
    register_adapter,
    register_base,
)
from tasks.tracking import (
    StageRecord,
    begin_parent_run,
    connect,
    end_parent_run,
    ensure_experiment,
    log_stage,
)
from tests.registering import Place, adapter_folder, llama_folder, new_database
from tests.tasks.test_registry import ask_elsewhere

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("mlflow_environment"),
    pytest.mark.filterwarnings("ignore:The ``noload``"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]
ACCESS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "tester",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, tmp_path / "s3.log"):
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="models")
        client.close()
        yield endpoint


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", new_database(folder)]
    with running(command, folder / "server.log"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


def test_from_a_flow_run_to_a_model_that_answers(server: str, s3: str, tmp_path: Path) -> None:
    # The server is still starting: this waits for it.
    client = connect(server)
    experiment = ensure_experiment(client, "team", "s3://models/mlflow")
    parent = begin_parent_run(
        client, experiment, flow_run_id="flow", name="team", recipe={"name": "team"}
    )
    place = Place(tmp_path, client, parent)

    folder = llama_folder(tmp_path)
    base = register_base(client, place.candidate("tiny", folder, "a" * 64))
    adapter = register_adapter(
        client, place.candidate("law", adapter_folder(tmp_path, folder), "b" * 64), base
    )
    move_alias(client, adapter, "champion", None)
    assert champion(client, "law", "champion") == adapter.__class__(
        "law", "1", "b" * 64, created=False
    )
    assert registered_keys(client) == {"a" * 64, "b" * 64}
    assert client.get_model_version("tiny", "1").source.startswith("s3://models/mlflow/")

    pull("models:/law@champion", tmp_path / "here", tracking_uri=server)
    assert list_files(tmp_path / "here" / "base") == list_files(folder)

    access = {**ACCESS, "MLFLOW_S3_ENDPOINT_URL": s3}
    _, answer = ask_elsewhere(server, "models:/law@champion", tmp_path, access)
    assert len(answer["generated"]) == 3

    end_parent_run(client, parent, "FINISHED")


def test_a_cached_stage_is_three_requests(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server)
    experiment = ensure_experiment(client, "requests", (tmp_path / "files").as_uri())
    parent = begin_parent_run(
        client, experiment, flow_run_id="flow", name="team", recipe={"name": "team"}
    )
    sent: list[str] = []
    send = requests.Session.send

    def counted(self: requests.Session, request: Any, **how: Any) -> requests.Response:
        sent.append(f"{request.method} {request.path_url}")
        return send(self, request, **how)

    monkeypatch.setattr(requests.Session, "send", counted)
    log_stage(
        client,
        parent,
        StageRecord("stage", "k" * 64, "model", cached=True, metrics={"size_bytes": 1.0}),
    )
    assert len(sent) == 3, sent
    sent.clear()
    end_parent_run(client, parent, "FINISHED")
    assert len(sent) == 1, sent


def test_server_that_goes_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with mlflow_server(tmp_path) as uri:
        client = connect(uri)
        ensure_experiment(client, "team", (tmp_path / "files").as_uri())
    with pytest.raises(ServiceUnreachableError, match=f"{uri} stopped answering"):
        ensure_experiment(client, "team")
    with pytest.raises(ServiceUnreachableError):
        registered_keys(client)
    assert os.environ["MLFLOW_TRACKING_URI"] == uri
