"""A house whose parts may be killed: store and MLflow's files in a bucket of its own S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.chaos.table import Row, write_table
from tests.flows.chaos.victims import Rooms
from tests.flows.house import RECIPE, open_house, processes_of, start
from tests.flows.terminal import ROOT
from tests.servers import S3Server, rgw_server

BUCKET = "chaos"
ALL = 24


@pytest.fixture(scope="package")
def killable_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, Path]]:
    """An S3 server, and the file with the number of its gateway's process."""
    root = tmp_path_factory.mktemp("killable")
    with rgw_server(root) as server:
        yield server, root / "run" / "client.admin.pid"


@pytest.fixture(scope="package")
def rooms(
    tmp_path_factory: pytest.TempPathFactory, parts: Path, killable_s3: tuple[S3Server, Path]
) -> Iterator[Rooms]:
    """Everything that `make up` starts, over S3."""
    server, pid = killable_s3
    terminal = open_house(tmp_path_factory.mktemp("chaos"))
    login = {
        "AWS_ENDPOINT_URL_S3": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    make_bucket(login)
    terminal.variables |= login | {
        "STILLROOM_DATA_ROOTS": str(parts),
        "STILLROOM_STORE": f"s3://{BUCKET}/store",
    }
    try:
        yield Rooms(start(terminal), pid)
    finally:
        assert terminal.type("down").returncode == 0
        assert processes_of(terminal.home) == []


def make_bucket(login: dict[str, str]) -> None:
    from tasks.store.s3_client import s3_client

    with pytest.MonkeyPatch.context() as here:
        for name, value in login.items():
            here.setenv(name, value)
        client = s3_client()
    client.create_bucket(Bucket=BUCKET)
    client.close()


@pytest.fixture(scope="package")
def table() -> Iterator[list[Row]]:
    """Rows to be added; once all are there, they are written down."""
    rows: list[Row] = []
    yield rows
    if len(rows) == ALL:
        write_table(rows, ROOT / "deployments" / "CHAOS.md")


@pytest.fixture
def whole_recipe(recipe: dict[str, Any], parts: Path) -> dict[str, Any]:
    """The road with stages that take some seconds each, also where every portion is sent to S3."""
    recipe["teacher"]["source"] = str(parts / "teacher")
    recipe["data"]["train"]["source"] = str(parts / "text.jsonl")
    recipe["distillation"]["cache"]["rows_per_shard"] = 8
    recipe["distillation"]["training"]["checkpoint_every_steps"] = 16
    assert recipe.keys() == RECIPE.keys()
    return recipe
