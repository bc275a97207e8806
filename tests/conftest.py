"""S3 servers, a registry, a mount, and an environment that knows nothing but one of them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers import S3Server, rgw_is_installed, rgw_server

if TYPE_CHECKING:
    from tests.registering import Place


@pytest.fixture(scope="session")
def mock_s3() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}", "testing", "testing")
    server.stop()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rgw_server(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(scope="session")
def any_s3(request: pytest.FixtureRequest) -> S3Server:
    """Ceph where it is installed, a mock elsewhere."""
    server: S3Server = request.getfixturevalue("ceph" if rgw_is_installed() else "mock_s3")
    return server


@pytest.fixture
def mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `connect` set MLflow's variables for this process: they are unset after the test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "unset")


@pytest.fixture
def place(tmp_path: Path, mlflow_environment: None) -> "Place":
    """MLflow in a folder, with a run that has begun."""
    from tests.registering import new_place

    return new_place(tmp_path)


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[S3Server], None]:
    """Point the AWS_* variables at a server, and at nothing that this machine has."""

    def point(server: S3Server) -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)

    return point


@pytest.fixture(params=["disk", "bound"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty folder that is a mount: a file system, or a folder bound from the same one."""
    folder, other = tmp_path / "a mount", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    how = ["--bind", str(other)] if request.param == "bound" else ["-t", "tmpfs", "tmpfs"]
    mount = ["mount", *how, str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
