"""A team's set-up on one machine: PostgreSQL under both servers, logins, Ceph as the store."""

import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import House, open_house, short_recipe, start, write_settings
from tests.flows.many import MANY
from tests.flows.terminal import Terminal
from tests.servers import POSTGRES_PROGRAMS, Postgres, S3Server, rgw_is_installed

NEEDS = [
    pytest.mark.skipif(not POSTGRES_PROGRAMS, reason="Debian's PostgreSQL is not installed"),
    pytest.mark.skipif(not rgw_is_installed(), reason="Ceph's radosgw is not installed"),
]
USER, PASSWORD = "ann", "planted%pass#word$1"
DATABASE_PASSWORD = "planted%data/base password@1"


def furnish(folder: Path, parts: Path, postgres: Postgres, s3: S3Server) -> Terminal:
    """Return a terminal with one settings file; credentials of S3 are in the environment."""
    terminal = open_house(folder)
    bucket = f"team-{uuid.uuid4().hex[:12]}"
    terminal.variables |= {
        "STILLROOM_HOST": "127.0.0.2",  # as where other machines call: a name MLflow does not know
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    _make_bucket(bucket, s3)
    recipes = terminal.folder / "recipes"
    recipes.mkdir()
    settings = {
        "STILLROOM_USER": USER,
        "STILLROOM_PASSWORD": PASSWORD,
        "STILLROOM_PREFECT_DATABASE": postgres.address("prefect", "asyncpg"),
        "STILLROOM_MLFLOW_DATABASE": postgres.address("mlflow", "psycopg2"),
        "STILLROOM_STORE": f"s3://{bucket}/store",
        "STILLROOM_MLFLOW_ARTIFACTS": f"s3://{bucket}/mlflow",
        "STILLROOM_DATA_ROOTS": str(parts),
        "STILLROOM_RECIPES": str(recipes),
        "STILLROOM_RUNS_AT_ONCE": str(MANY),
        "STILLROOM_GPUS": "cpu",
    }
    lines = (f"{name}='{value}'\n" for name, value in settings.items())
    write_settings(terminal, "".join(lines))
    terminal.write(sent(parts))
    return terminal


def sent(parts: Path) -> dict[str, Any]:
    """Return the short recipe, to be made in the GPU pool."""
    return short_recipe(parts) | {"execution": {"threads": 1, "over": "workers"}}


def move_into(terminal: Terminal) -> House:
    """Start what the settings say."""
    return start(terminal, (USER, PASSWORD))


def _make_bucket(name: str, s3: S3Server) -> None:
    import boto3

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=name)
    client.close()
