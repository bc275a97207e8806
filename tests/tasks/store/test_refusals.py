"""What a store says, and leaves behind, where the disk or the server refuses."""

import errno
import os
import re
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillroom.errors import StoreError, StoreUnreachableError
from tasks.store.local import LocalBackend
from tasks.store.store import ArtifactStore, open_store
from tests.servers import S3Server, free_port
from tests.tasks.store.conftest import PLACES
from tests.tasks.store.making import KEY, OTHER_KEY, add, random_bytes, write_files

SMALL_DISK_BYTES = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Return what limits each file that this process writes to 1 MiB, as quotas do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestLocal:
    def test_a_full_disk_leaves_nothing_half_written(
        self, small_disk: Path, tmp_path: Path
    ) -> None:
        store = ArtifactStore(LocalBackend(small_disk / "store"))
        folder = write_files(tmp_path / "made", {"a": b"small", "b": random_bytes(2**21)})
        with pytest.raises(StoreError, match=r"the disk is full.*store gc --dry-run"):
            add(store, folder)
        assert store.find("model", KEY) is None
        assert list(store.backend.drafts()) == []
        assert list(store.verify()) == []
        with pytest.raises(StoreError, match="the disk is full"):
            store.checkpoints(KEY).save("piece", folder)
        assert list(store.backend.list("partial/")) == []
        # What fits is stored: the failed attempts kept no space.
        add(store, write_files(tmp_path / "fits", {"model": random_bytes(600_000)}))

    def test_a_full_disk_of_the_workspace_is_said(self, small_disk: Path, tmp_path: Path) -> None:
        store = ArtifactStore(LocalBackend(tmp_path / "store"))
        record = add(store, write_files(tmp_path / "made", {"model": random_bytes(2**21)}))
        with pytest.raises(StoreError, match="the disk is full"):
            store.fetch(record, small_disk / "fetched")

    def test_a_quota_leaves_nothing_half_written(
        self, tmp_path: Path, small_files: Callable[[], None]
    ) -> None:
        store = ArtifactStore(LocalBackend(tmp_path / "store"))
        folder = write_files(tmp_path / "made", {"a": b"small", "b": random_bytes(2**21)})
        small_files()
        with pytest.raises(StoreError, match="the disk is full"):
            add(store, folder)
        assert store.find("model", KEY) is None
        assert list(store.backend.drafts()) == []

    def test_a_blob_of_another_user_is_replaced_by_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

        store = ArtifactStore(LocalBackend(tmp_path / "store"))
        folder = write_files(tmp_path / "made")
        record = add(store, folder)
        monkeypatch.setattr(os, "utime", refuse)  # as for a file that is not ours
        assert add(store, folder, key=OTHER_KEY).files == record.files
        assert list(store.verify()) == []
        assert list(store.backend.drafts()) == []

    def test_a_read_only_store_can_be_read(self, small_disk: Path, tmp_path: Path) -> None:
        store = ArtifactStore(LocalBackend(small_disk / "store"))
        folder = write_files(tmp_path / "made")
        record = add(store, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        assert store.find("model", KEY) == record
        store.fetch(record, tmp_path / "fetched")
        sentence = r"Read-only file system.*STILLROOM_STORE"
        with pytest.raises(StoreError, match=sentence):
            add(store, folder, key="ef" * 32)
        with pytest.raises(StoreError, match=sentence), store.lease(KEY):
            pass
        with pytest.raises(StoreError, match=sentence):
            store.forget(record)
        with pytest.raises(StoreError, match=sentence):
            store.checkpoints(KEY).save("piece", folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_write_access_is_named(self, tmp_path: Path) -> None:
        folder = write_files(tmp_path / "made")
        (tmp_path / "store").mkdir(mode=0o555)
        with pytest.raises(StoreError, match=r"Permission denied.*STILLROOM_STORE"):
            add(open_store(str(tmp_path / "store")), folder)

    def test_a_store_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "store").write_text("not a folder")
        store = open_store(str(tmp_path / "store"))
        with pytest.raises(StoreError, match=re.escape(str(tmp_path / "store"))):
            store.find("model", KEY)
        with pytest.raises(StoreError, match="not a folder"):
            list(store.records())

    def test_a_writer_killed_midway_leaves_a_draft_that_is_no_object(self, tmp_path: Path) -> None:
        store = ArtifactStore(LocalBackend(tmp_path / "store"))
        add(store, write_files(tmp_path / "made"))
        objects = list(store.backend.list(""))
        (tmp_path / "store" / "blobs" / f"{KEY}.0f.part").write_bytes(b"half")
        assert list(store.backend.list("")) == objects
        assert [draft.size for draft in store.backend.drafts()] == [4]


class TestServer:
    @pytest.fixture(params=PLACES[1:])
    def server(
        self,
        request: pytest.FixtureRequest,
        s3_environment: Callable[[S3Server], None],
    ) -> S3Server:
        server = request.getfixturevalue(request.param)
        assert isinstance(server, S3Server)
        s3_environment(server)
        return server

    def test_a_missing_bucket_is_named(self, server: S3Server, tmp_path: Path) -> None:
        store = open_store("s3://no-such-bucket-here/prefix")
        sentence = f"{server.endpoint} has no bucket 'no-such-bucket-here'"
        with pytest.raises(StoreError, match=sentence):
            store.find("model", KEY)
        with pytest.raises(StoreError, match=sentence):
            add(store, write_files(tmp_path / "made"))
        with pytest.raises(StoreError, match=sentence):
            list(store.records())

    def test_an_interrupted_upload_is_a_draft_until_it_is_aborted(self, server: S3Server) -> None:
        backend = open_store("s3://drafts/prefix").backend
        client = backend.client  # type: ignore[attr-defined]
        client.create_bucket(Bucket="drafts")
        client.create_multipart_upload(Bucket="drafts", Key="prefix/blobs/ab")
        (draft,) = backend.drafts()
        assert draft.name.startswith("blobs/ab?")
        assert list(backend.list("")) == []
        backend.delete_draft(draft.name)
        backend.delete_draft(draft.name)  # nothing to do
        assert list(backend.drafts()) == []

    def test_missing_credentials_are_said(
        self, server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            open_store("s3://bucket/prefix").find("model", KEY)


REFUSED = r"refuses the credentials .*AWS_SECRET_ACCESS_KEY"


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("place", PLACES[2:])
def test_ceph_refuses_wrong_credentials(
    request: pytest.FixtureRequest,
    place: str,
    name: str,
    s3_environment: Callable[[S3Server], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    s3_environment(request.getfixturevalue(place))
    open_store("s3://private").backend.client.create_bucket(  # type: ignore[attr-defined]
        Bucket="private"
    )
    monkeypatch.setenv(name, "wrong")
    store = open_store("s3://private")
    with pytest.raises(StoreError, match=REFUSED):
        store.find("model", KEY)
    with pytest.raises(StoreError, match=REFUSED):
        add(store, write_files(tmp_path / "made"))


def test_a_mock_server_refuses_wrong_credentials(
    mock_s3: S3Server, s3_environment: Callable[[S3Server], None], tmp_path: Path
) -> None:
    import httpx

    s3_environment(mock_s3)
    store = open_store("s3://guarded")
    store.backend.client.create_bucket(Bucket="guarded")  # type: ignore[attr-defined]
    reset = f"{mock_s3.endpoint}/moto-api/reset-auth"
    # From here on the mock knows no user: every key is a wrong one.
    httpx.post(reset, content=b"0").raise_for_status()
    try:
        with pytest.raises(StoreError, match=REFUSED):
            store.find("model", KEY)
        with pytest.raises(StoreError, match=REFUSED):
            add(store, write_files(tmp_path / "made"))
    finally:
        httpx.post(reset, content=b"inf").raise_for_status()


class TestUnreachable:
    @pytest.fixture
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STILLROOM_S3_TIMEOUT", "4")

    @pytest.mark.usefixtures("soon")
    def test_a_server_that_is_down_is_named_within_the_time(
        self, s3_environment: Callable[[S3Server], None], tmp_path: Path
    ) -> None:
        endpoint = f"http://127.0.0.1:{free_port()}"
        s3_environment(S3Server(endpoint, "a", "b"))
        store = open_store("s3://bucket/prefix")
        started = time.monotonic()
        with pytest.raises(StoreUnreachableError, match=f"{endpoint} .*a rerun continues"):
            store.find("model", KEY)
        with pytest.raises(StoreUnreachableError, match=endpoint):
            list(store.records())
        assert time.monotonic() - started < 10

    @pytest.mark.usefixtures("soon")
    def test_a_server_that_never_answers_is_named(
        self, s3_environment: Callable[[S3Server], None]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
            s3_environment(S3Server(endpoint, "a", "b"))
            started = time.monotonic()
            with pytest.raises(StoreUnreachableError, match=endpoint):
                open_store("s3://bucket").find("model", KEY)
            assert time.monotonic() - started < 12

    def test_a_server_that_comes_back_in_time_is_waited_for(
        self, s3_environment: Callable[[S3Server], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from moto.server import ThreadedMotoServer

        # Of so few seconds botocore alone would try a second time within the first, and give up.
        monkeypatch.setenv("STILLROOM_S3_TIMEOUT", "14")
        port = free_port()
        s3_environment(S3Server(f"http://127.0.0.1:{port}", "a", "b"))
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
        start = threading.Timer(3, server.start)
        start.start()
        try:
            client = open_store("s3://later").backend.client  # type: ignore[attr-defined]
            client.create_bucket(Bucket="later")
            assert open_store("s3://later").find("model", KEY) is None
        finally:
            start.join()
            server.stop()

    @pytest.mark.usefixtures("soon")
    def test_a_server_in_trouble_is_unreachable(
        self, s3_environment: Callable[[S3Server], None]
    ) -> None:
        answer = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        with socket.create_server(("127.0.0.1", 0)) as troubled:
            troubled.settimeout(10)

            def serve() -> None:
                for _ in range(2):
                    connection, _ = troubled.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            endpoint = f"http://127.0.0.1:{troubled.getsockname()[1]}"
            s3_environment(S3Server(endpoint, "a", "b"))
            with pytest.raises(StoreUnreachableError, match="503"):
                open_store("s3://bucket").find("model", KEY)
            thread.join()


class TestAddresses:
    def test_a_path_and_its_url_are_the_same_store(self, tmp_path: Path) -> None:
        folder = tmp_path / "a store"
        record = add(open_store(str(folder)), write_files(tmp_path / "made"))
        assert open_store(folder.as_uri()).find("model", KEY) == record
        assert open_store(folder.as_uri()).url == folder.as_uri()

    def test_an_s3_address_comes_back(self, s3_environment: Callable[[S3Server], None]) -> None:
        s3_environment(S3Server("http://127.0.0.1:1", "a", "b"))
        assert open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
        assert open_store("s3://bucket").url == "s3://bucket"

    @pytest.mark.parametrize(
        "url", ["", "http://host/x", "s3:///prefix", "file://host/x", "s3://key:secret@bucket/x"]
    )
    def test_other_addresses_are_refused_without_repeating_them(self, url: str) -> None:
        with pytest.raises(StoreError, match="STILLROOM_STORE") as caught:
            open_store(url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("AWS_ENDPOINT_URL_S3", "no address"), ("STILLROOM_S3_TIMEOUT", "soon")],
    )
    def test_bad_settings_are_named(
        self,
        s3_environment: Callable[[S3Server], None],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        value: str,
    ) -> None:
        s3_environment(S3Server("http://127.0.0.1:1", "a", "b"))
        monkeypatch.setenv(name, value)
        with pytest.raises(StoreError, match=name) as caught:
            open_store("s3://bucket")
        assert repr(value) in str(caught.value)
