"""What setting up says where it cannot; that it can is shown in tests/deployments."""

from pathlib import Path

import pytest

from tasks.servers.set_up import main
from tests.servers import S3Server, free_port


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path))
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "STILLROOM_STORE"):
        monkeypatch.delenv(name, raising=False)


def test_no_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    assert "PREFECT_API_URL" in capsys.readouterr().err


def test_server_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:hidden@127.0.0.1:{free_port()}/api")
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was not set up" in line
    assert "PREFECT_API_AUTH_STRING" in line
    assert "hidden" not in line


def test_s3_server_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("STILLROOM_STORE", "s3://stillroom/store")
    monkeypatch.setenv("STILLROOM_S3_TIMEOUT", "2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3://stillroom" in line
    assert "does not answer" in line


def test_bucket_is_made_once(
    mock_s3: S3Server,
    s3_environment: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(s3_environment)
    s3_environment(mock_s3)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setenv("STILLROOM_STORE", "s3://made-by-set-up/store")
    assert main() == 2
    assert "made the bucket made-by-set-up" in capsys.readouterr().out
    assert main() == 2
    assert "made the bucket" not in capsys.readouterr().out
