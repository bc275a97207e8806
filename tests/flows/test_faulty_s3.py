"""The whole road over an S3 server that one time in ten refuses, dawdles, cuts or changes."""

import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.checkpoint import sha256_of
from tasks.store.record import Record
from tasks.store.store import open_store
from tests.faulty_s3 import faulty
from tests.flows.house import small_recipe
from tests.flows.terminal import Terminal, assert_done, move_in
from tests.servers import S3Server

# The server's faults make it wait for most of it.
SECONDS = 300
# An evaluation holds times, which differ.
COMPARED = {"model", "dataset", "teacher-cache", "adapter"}


@pytest.mark.integration
@pytest.mark.service
def test_road_over_faulty_s3(
    terminal: Callable[[], Terminal],
    recipe: dict[str, Any],
    parts: Path,
    tmp_path: Path,
    any_s3: S3Server,
    s3_environment: Callable[[S3Server], None],
    empty_database: Path,
) -> None:
    from tasks.store.s3_client import s3_client

    s3_environment(any_s3)
    bucket = f"stillroom-{uuid.uuid4().hex[:12]}"
    client = s3_client()
    client.create_bucket(Bucket=bucket)
    client.upload_file(str(parts / "text.jsonl"), bucket, "texts/text.jsonl")
    client.close()
    small = small_recipe(recipe, parts)
    small["data"]["train"]["source"] = f"s3://{bucket}/texts/text.jsonl"
    opened = terminal()
    opened.write(small)

    with faulty(any_s3) as faults:
        opened.variables |= {
            "AWS_ENDPOINT_URL_S3": faults.server.endpoint,
            "AWS_ACCESS_KEY_ID": any_s3.access_key,
            "AWS_SECRET_ACCESS_KEY": any_s3.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "STILLROOM_STORE": f"s3://{bucket}/store",
        }
        assert_done(opened.type("compress", "recipe.yaml", seconds=SECONDS))
        assert {"503", "slow", "wrong", "cut"} <= set(faults.done), faults.done
        pull(opened, "models:/tiny-law@champion", tmp_path / "pulled")

    by_faults = compared(list(open_store(f"s3://{bucket}/store").records()))
    opened.variables |= {
        "AWS_ENDPOINT_URL_S3": any_s3.endpoint,
        "STILLROOM_HOME": str(tmp_path / "undisturbed"),
        "STILLROOM_STORE": "",
    }
    move_in(opened.home, empty_database)
    assert_done(opened.compress())
    assert by_faults == compared(list(opened.store.records()))
    (adapter,) = opened.records("adapter")
    for file in adapter.files:
        if file.path.endswith(".safetensors"):
            assert sha256_of(tmp_path / "pulled" / "adapter" / file.path) == file.sha256


def pull(opened: Terminal, model: str, folder: Path) -> None:
    """Pull a model in a process of its own, for MLflow's client remembers where it has been."""
    registry = f"sqlite:///{opened.home / 'mlflow.db'}"
    command = [sys.executable, "-m", "stillroom.cli", "pull", model, str(folder)]
    done = subprocess.run(
        [*command, "--tracking", registry],
        env=opened.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compared(records: list[Record]) -> dict[str, dict[str, str]]:
    """Return the hash of each file of what was made, by the key of its artifact."""
    found = {
        record.key: {file.path: file.sha256 for file in record.files}
        for record in records
        if record.kind in COMPARED
    }
    assert len(found) >= 6
    return found
