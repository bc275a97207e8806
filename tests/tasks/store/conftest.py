"""The places over which the store's contract is tested."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.store.local import LocalBackend
from tasks.store.store import ArtifactStore
from tests.servers import S3Server, rgw_is_installed

PLACES = [
    "local",
    "mock_s3",
    pytest.param(
        "ceph",
        marks=[
            pytest.mark.integration,
            pytest.mark.skipif(not rgw_is_installed(), reason="Ceph's radosgw is not installed"),
        ],
    ),
]
PART_BYTES = 5 * 2**20


@pytest.fixture(params=PLACES)
def store(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    s3_environment: Callable[[S3Server], None],
) -> Iterator[ArtifactStore]:
    """An empty store, over each kind of place."""
    if request.param == "local":
        yield ArtifactStore(LocalBackend(tmp_path / "store"))
        return
    from tasks.store.s3 import S3Backend

    s3_environment(request.getfixturevalue(request.param))
    bucket = f"stillroom-{uuid.uuid4().hex[:12]}"
    backend = S3Backend(bucket, "some/prefix", part_bytes=PART_BYTES)
    backend.client.create_bucket(Bucket=bucket)
    yield ArtifactStore(backend)
    backend.client.close()
