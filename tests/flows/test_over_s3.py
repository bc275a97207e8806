"""The whole road over S3: artifacts, checkpoints and MLflow's files in a bucket."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.house import STAGES, small_recipe
from tests.flows.terminal import Terminal, assert_done, assert_sound
from tests.servers import S3Server


@pytest.mark.integration
def test_road_over_s3(
    any_s3: S3Server,
    terminal: Callable[[], Terminal],
    recipe: dict[str, Any],
    parts: Path,
    tmp_path: Path,
) -> None:
    from tasks.store.s3_client import s3_client

    opened = terminal()
    bucket = f"stillroom-{uuid.uuid4().hex[:12]}"
    login = {
        "AWS_ENDPOINT_URL_S3": any_s3.endpoint,
        "AWS_ACCESS_KEY_ID": any_s3.access_key,
        "AWS_SECRET_ACCESS_KEY": any_s3.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as here:
        for name, value in login.items():
            here.setenv(name, value)
        client = s3_client()
    client.create_bucket(Bucket=bucket)
    opened.variables |= login | {"STILLROOM_STORE": f"s3://{bucket}/some/prefix"}
    small = small_recipe(recipe, parts) | {"adapters": []}
    # Pieces of the cache are claimed in the bucket, and checkpoints read by both who train.
    small["execution"] |= {"cache_workers": 2, "training_processes": 2}
    small["distillation"]["training"] |= {"batch_rows": 1, "gradient_accumulation": 2}
    opened.write(small)

    assert_done(opened.compress())
    keys = [
        item["Key"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for item in page["Contents"]
    ]
    client.close()
    assert any(key.startswith("some/prefix/blobs/") for key in keys)
    assert any(key.startswith("some/prefix/mlflow/") for key in keys)
    assert not any(key.startswith("some/prefix/partial/") for key in keys)
    assert opened.versions() == 1
    assert not (opened.home / "store").exists()

    assert_done(opened.compress(), tuple(stage for stage in STAGES if "law" not in stage))
    assert opened.versions() == 1
    assert_sound(opened)
