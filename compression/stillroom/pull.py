"""Fetch a registered model from MLflow, verified, as a folder that `from_pretrained` loads."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.adapted import join_base, merge_into
from stillroom.contents import LISTING, BaseReference, Contents, read_contents, verify_files
from stillroom.errors import (
    CorruptedError,
    LoginError,
    MismatchError,
    ServiceUnreachableError,
    SourceError,
    StoreError,
    StoreUnreachableError,
)
from stillroom.folder import WHOLE, filling
from stillroom.redaction import redact

ATTEMPTS = 4
# How MLflow words a request that got no answer; its error codes do not tell.
_NO_ANSWER = ("failed with exception", "Max retries exceeded", "Connection refused")
# How botocore words that an answer's checksum is another than that of its content.
_WRONG_BYTES = "did not match calculated checksum"


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"


def pull(
    model_uri: str, folder: Path, *, merged: bool = False, tracking_uri: str | None = None
) -> None:
    """Leave the registered model in `folder`, with every SHA-256 verified, or nothing at all.

    A base becomes a plain checkpoint. An adapter becomes `folder/base`, a plain checkpoint, and
    `folder/adapter`. A LoRA has links to the base's files: `from_pretrained` on it loads both from
    wherever the folder lies. Its config names `../base`, which peft's own loaders read relative to
    the working directory, not to the adapter. Other methods are put on the base by
    `stillroom.adapters.folder.load_into`, a trained subspace by
    `stillroom.intrinsic_dimension.artifact.load_with_base`. With `merged`, a LoRA or a subspace
    becomes one dense model in `folder`.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        folder: must not exist, or be empty; it may be a mount, or a link to a folder.
        merged: add the adapter into its base's weights, in float32.
        tracking_uri: address of MLflow; absent: MLFLOW_TRACKING_URI.

    Raises:
        SourceError: there is no such version.
        StoreError: the folder is not empty, or the files cannot be fetched or written.
        CorruptedError: a file is not the one that was registered.
        ServiceUnreachableError: MLflow does not answer.
    """
    parse_reference(model_uri)
    with filling(folder) as scratch:
        client = open_client(tracking_uri)
        _assemble(client, find(client, model_uri), scratch, merged=merged)


def _assemble(client: Any, version: Version, scratch: Path, *, merged: bool) -> None:
    contents = fetch(client, version, scratch / "own")
    if contents.base is None:
        (scratch / "own").rename(scratch / WHOLE)
        return
    pair = scratch / "pair"
    pair.mkdir()
    (scratch / "own").rename(pair / "adapter")
    fetch_base(client, contents.base, pair / "base")
    if merged:
        merge_into(pair / "base", pair / "adapter", contents.task, scratch / WHOLE)
    else:
        join_base(pair / "adapter", pair / "base")
        pair.rename(scratch / WHOLE)


def fetch(client: Any, version: Version, folder: Path) -> Contents:
    """Write the files of a registered version into `folder`, verified, and return their list.

    Raises:
        SourceError: the version was not registered by Stillroom.
        StoreError: its files cannot be fetched.
        CorruptedError: a file is not the one that was registered.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _fetch(client, version, folder)
        except CorruptedError:  # on the way, perhaps: then it comes as it was stored next time
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _fetch(client: Any, version: Version, folder: Path) -> Contents:
    raw = folder.with_name(f"{folder.name}.raw")
    shutil.rmtree(raw, ignore_errors=True)  # of an earlier attempt
    found = download(client, version, "artifacts", raw)
    if not (found / LISTING).exists():
        raise SourceError(
            f"{version} holds no {LISTING}: expected a model that Stillroom registered"
        )
    contents = read_contents(found / LISTING)
    verify_files(found / "model", contents.files, str(version))
    (found / "model").rename(folder)
    shutil.rmtree(raw)
    return contents


def download(client: Any, version: Version, path: str, folder: Path) -> Path:
    """Write a file or folder of a registered version below `folder`; return where it lies.

    Raises:
        ServiceUnreachableError: MLflow does not answer.
        StoreError: where the files lie, they cannot be fetched.
        CorruptedError: S3 says that something else was stored than what came.
    """
    from mlflow.artifacts import download_artifacts

    with reaching(client.tracking_uri):
        uri = client.get_model_version_download_uri(version.name, version.version)
    with _fetching(version):
        found = download_artifacts(
            artifact_uri=f"{uri}/{path}", dst_path=str(folder), tracking_uri=client.tracking_uri
        )
    return Path(found)


def fetch_base(client: Any, base: BaseReference, folder: Path) -> None:
    """Write the base of an adapter into `folder`, and check that it is the one it was trained on.

    Raises:
        MismatchError: another base is registered under that name and version.
        CorruptedError: a file is not the one that was registered.
    """
    version = Version(base.name, base.version)
    contents = fetch(client, version, folder)
    if contents.files != base.files:
        raise MismatchError(
            f"{version} is not the base this adapter was trained on: expected artifact "
            f"{base.artifact_key[:12]}…, {contents.artifact_key[:12]}… came; train the adapter "
            "again"
        )


def find(client: Any, reference: str) -> Version:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names now.

    Raises:
        SourceError: there is none.
    """
    from mlflow.exceptions import MlflowException

    name, alias, version = parse_reference(reference)
    try:
        with reaching(client.tracking_uri):
            if alias:
                found = client.get_model_version_by_alias(name, alias)
            else:
                found = client.get_model_version(name, version)
    except MlflowException as error:
        raise SourceError(
            f"{reference}: MLflow has no such registered version; check the name and the tracking "
            f"URI {redact(client.tracking_uri)}"
        ) from error
    return Version(found.name, str(found.version))


def parse_reference(reference: str) -> tuple[str, str, str]:
    """Return name, alias and version of a reference; one of the last two is empty.

    Raises:
        SourceError: it is none.
    """
    match = re.fullmatch(r"models:/([^/@:]+)(?:@([\w-]+)|/(\d+))", reference)
    if match is None:
        raise SourceError(
            f"{reference!r} is no registered model: expected models:/NAME@ALIAS or "
            "models:/NAME/VERSION"
        )
    return match[1], match[2] or "", match[3] or ""


def open_client(tracking_uri: str | None = None, *, wait_seconds: float = 10.0) -> Any:
    """Return an MlflowClient of a server that answers.

    Raises:
        ServiceUnreachableError: it does not answer within `wait_seconds`.
    """
    try:
        from mlflow.tracking import MlflowClient, get_tracking_uri
    except ImportError as error:
        raise SourceError(
            'mlflow is not installed: install it with pip install "stillroom[pull]"'
        ) from error

    uri = tracking_uri or get_tracking_uri()
    wait_for_server(uri, wait_seconds)
    with reaching(uri):
        return MlflowClient(uri, uri)


def wait_for_server(uri: str, wait_seconds: float) -> None:
    """Return once the server at an http(s) address answers; other addresses need none.

    Raises:
        ServiceUnreachableError: it does not within `wait_seconds`.
    """
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    end = time.monotonic() + wait_seconds
    pause = 0.2
    while True:
        try:
            # Any answer will do, a refused login too: the next call then says what is wrong.
            if requests.get(f"{uri.rstrip('/')}/health", timeout=5).status_code < 500:
                return
            problem = "it answers with an error"
        except requests.RequestException as error:
            problem = type(error).__name__
        if time.monotonic() + pause > end:
            raise ServiceUnreachableError(
                f"MLflow at {redact(uri)} did not answer within {wait_seconds:g} "
                f"seconds ({problem}): start it or set MLFLOW_TRACKING_URI, then run the same "
                "command again; it continues where it stopped"
            )
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn a request to MLflow that got no answer into ServiceUnreachableError.

    One that it refuses for who asks becomes a LoginError.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if any(words in str(error) for words in _NO_ANSWER):
            raise ServiceUnreachableError(
                f"MLflow at {redact(uri)} stopped answering: run the same command "
                "again when it is back; it continues where it stopped"
            ) from error
        if "error code 401" in str(error) or error.error_code == "UNAUTHENTICATED":
            raise LoginError(
                f"MLflow at {redact(uri)} refuses the login, or wants one: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        if error.error_code == "PERMISSION_DENIED":
            raise LoginError(
                f"MLflow at {redact(uri)} does not let this user do that: ask its administrator"
            ) from error
        raise


@contextmanager
def _fetching(version: Version) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except Exception as error:
        said = f"the files of {version} cannot be fetched: {' '.join(str(error).split())[:300]}"
        if _WRONG_BYTES in str(error):
            raise CorruptedError(said) from error
        if isinstance(error, MlflowException | OSError | ImportError):
            raise StoreError(said) from error
        # botocore is an extra: its errors can only be told by where they come from.
        if type(error).__module__.partition(".")[0] not in ("botocore", "boto3", "s3transfer"):
            raise
        raise StoreUnreachableError(
            f"the files of {version} cannot be fetched from S3: {error}; check the network and "
            "the credentials"
        ) from error
