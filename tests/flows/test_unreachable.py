"""Servers that do not answer or do not let us in: which one is said, and a rerun continues."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.flows.terminal import Terminal, assert_done, assert_refused
from tests.servers import free_port, running

pytestmark = pytest.mark.integration
Open = Callable[..., Terminal]
Recipe = dict[str, Any]
START_SECONDS = 60
FIRST_STAGES = ("import teacher", "prepare data")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def on_s3(terminal: Open, recipe: Recipe, s3: str) -> Terminal:
    """A terminal whose store is a new bucket; the recipe only imports, prepares and measures."""
    import boto3

    user = terminal()
    bucket = f"stillroom-{uuid.uuid4().hex[:8]}"
    access = {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "tester",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": s3,
    }
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=s3,
        aws_access_key_id="tester",
        aws_secret_access_key="tester",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    user.variables |= access | {
        "STILLROOM_STORE": f"s3://{bucket}/store",
        "STILLROOM_MLFLOW_ARTIFACTS": (user.home / "mlflow-artifacts").as_uri(),
        "STILLROOM_S3_TIMEOUT": "4",
    }
    del recipe["distillation"], recipe["quantization"], recipe["publish"]
    user.write(recipe)
    return user


def test_wrong_s3_credentials(on_s3: Terminal, s3: str) -> None:
    reset = f"{s3}/moto-api/reset-auth"
    # From here on the server knows no user: every key is a wrong one.
    httpx.post(reset, content=b"0").raise_for_status()
    try:
        line = assert_refused(on_s3.compress(), "refuses the credentials", "AWS_SECRET_ACCESS_KEY")
        assert s3 in line
        assert_refused(on_s3.compress("--plan"), "refuses the credentials")
        assert_refused(on_s3.type("store", "ls"), "refuses the credentials")
    finally:
        httpx.post(reset, content=b"inf").raise_for_status()
    listed = on_s3.type("store", "ls")
    assert "0 artifacts" in listed.stdout


def test_an_unreachable_s3_server(on_s3: Terminal, s3: str) -> None:
    assert_done(on_s3.compress())
    nowhere = f"http://127.0.0.1:{free_port()}"
    on_s3.variables["AWS_ENDPOINT_URL_S3"] = nowhere
    started = time.monotonic()
    line = assert_refused(on_s3.compress(), "the S3 server", "does not answer", "rerun continues")
    assert nowhere in line
    assert time.monotonic() - started < 60
    on_s3.variables["AWS_ENDPOINT_URL_S3"] = s3
    assert_done(on_s3.compress(), (*FIRST_STAGES, "evaluate teacher"))
    assert "is sound" in on_s3.type("store", "verify").stdout


@pytest.fixture
def with_mlflow(
    terminal: Open, finished: Terminal, recipe: Recipe, empty_database: Path
) -> Terminal:
    """A terminal that tracks on a server which is not there yet."""
    user = terminal(like=finished)
    user.variables |= {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "STILLROOM_MLFLOW_TIMEOUT": "3",
    }
    user.write(recipe)
    return user


def serving(user: Terminal) -> "Any":
    port = user.variables["MLFLOW_TRACKING_URI"].rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
    command += ["--backend-store-uri", f"sqlite:///{user.home / 'mlflow.db'}", "--workers", "1"]
    command += ["--no-serve-artifacts", "--default-artifact-root", str(user.home / "files")]
    return running(command, user.folder / "mlflow.log", user.environment())


def await_mlflow(user: Terminal) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{user.variables['MLFLOW_TRACKING_URI']}/health").is_success:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline
        time.sleep(0.2)


def test_an_unreachable_mlflow_server(with_mlflow: Terminal) -> None:
    user, address = with_mlflow, with_mlflow.variables["MLFLOW_TRACKING_URI"]
    started = time.monotonic()
    line = assert_refused(user.compress(), "MLflow at", "did not answer within 3 seconds")
    assert address in line
    assert "it continues where it stopped" in line
    assert 3 < time.monotonic() - started < 40
    # What asks MLflow before it removes anything removes nothing.
    before = len(list(user.store.records()))
    user.variables["STILLROOM_MLFLOW_TIMEOUT"] = "1"
    assert_refused(user.type("store", "gc", "--min-age-days", "0"), "MLflow at")
    assert len(list(user.store.records())) == before


def test_an_mlflow_server_that_goes_away_and_comes_back(with_mlflow: Terminal) -> None:
    user = with_mlflow
    (quantized,) = [r for r in user.store.records() if "group_size" in r.section]
    user.forget(quantized)
    with serving(user):
        await_mlflow(user)
        flow = subprocess.Popen(
            user.command("compress", "recipe.yaml"),
            cwd=user.folder,
            env=user.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        heard = ([], [])  # type: tuple[list[str], list[str]]
        readers = [
            threading.Thread(target=lambda pipe=pipe, lines=lines: lines.extend(pipe))
            for pipe, lines in zip((flow.stdout, flow.stderr), heard, strict=True)
        ]
        for reader in readers:
            reader.start()
        try:
            deadline = time.monotonic() + START_SECONDS
            while not any((user.home / "scratch").glob("*-*")) and flow.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        except BaseException:
            flow.kill()
            raise
    # The server is gone while the model is quantized.
    try:
        code = flow.wait(120)
    finally:
        flow.kill()
        flow.wait()
        for reader in readers:
            reader.join()
        for pipe in (flow.stdout, flow.stderr):
            if pipe is not None:
                pipe.close()
    done = subprocess.CompletedProcess([], code, "".join(heard[0]), "".join(heard[1]))
    assert_refused(done, "MLflow at", "stopped answering", "it continues where it stopped")
    assert user.versions() == 0
    with serving(user):
        await_mlflow(user)
        assert_done(user.compress(), (*FIRST_STAGES, "distil student", "quantize"))
    assert user.versions() == 1
