"""A store in an S3 bucket, through boto3; credentials and endpoint come from the environment."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions as aws
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from stillroom.errors import StoreError, StoreUnreachableError
from tasks.store.backend import Entry
from tasks.store.local import explained_disk

ATTEMPTS = 5
BACKOFF_SECONDS = 15.0  # botocore's standard mode waits at most 1 + 2 + 4 + 8 s between 5 attempts
PART_BYTES = 16 * 2**20
READ_BYTES = 2**20
RACE_ATTEMPTS = 5

_MISSING = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("412", "PreconditionFailed")
_UNDECIDED = ("409", "ConditionalRequestConflict", "OperationAborted")
_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
)
_WRONG_CREDENTIALS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken")


def s3_client(endpoint_url: str | None = None) -> Any:
    """Return a boto3 client that retries for about a minute and works with Ceph's gateway.

    Credentials come from the usual AWS_* variables (or files, or the machine's role); the
    endpoint from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL. STILLROOM_S3_TIMEOUT sets for how
    many seconds a server that refuses connections is tried (default 60).

    Raises:
        StoreError: the endpoint is not an address, or STILLROOM_S3_TIMEOUT not a number.
    """
    endpoint = endpoint_url or _endpoint()
    seconds = _timeout()
    # Backoff and connection attempts share the time; an answer may take longer than a connection.
    attempts = ATTEMPTS if seconds > BACKOFF_SECONDS else 2
    connect = max(1.0, (seconds - (BACKOFF_SECONDS if attempts == ATTEMPTS else 1)) / attempts)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=connect,
        read_timeout=max(connect, seconds / 2),
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Ceph answers neither the newer default checksums nor their validation.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        ignore_configured_endpoint_urls=endpoint_url is not None,
    )
    try:
        # A session of its own: boto3's default one is global, and not safe between threads.
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise StoreError(
            f"the S3 endpoint {endpoint!r} is not an address; set AWS_ENDPOINT_URL_S3 to one like "
            "http://127.0.0.1:9000, or unset it for Amazon's own"
        ) from error


class S3Backend:
    """Keep objects below a prefix of a bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.client = s3_client(endpoint_url)
        # Files above one part go in parts, several at a time; S3 wants parts of 5 MiB and more.
        self.transfer = TransferConfig(
            multipart_threshold=part_bytes, multipart_chunksize=part_bytes
        )

    @property
    def url(self) -> str:
        """The s3:// address of the prefix."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def get(self, name: str, target: Path, *, share: bool = False) -> bool:
        """Write an object to the file `target`; return False where there is none."""
        with explained_disk(f"{target} cannot be written"), self._explained():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _missing_allowed():
                self.client.download_file(
                    self.bucket, self.prefix + name, str(target), Config=self.transfer
                )
                return True
        return False

    def put_file(self, name: str, source: Path) -> None:
        """Store a file under a name that stands for its content."""
        with explained_disk(f"{source} cannot be read"), self._explained():
            if self._size(name) == source.stat().st_size:
                return
            with source.open("rb") as file:
                self.client.upload_fileobj(
                    file, self.bucket, self.prefix + name, Config=self.transfer
                )

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Store `content` unless the name is taken; return whether it was free.

        A put that is sent again because its answer was lost finds its own object, and reports
        the name as taken: whoever adopts what is there reads the same bytes.
        """
        for attempt in range(RACE_ATTEMPTS):
            with self._explained():
                try:
                    self.client.put_object(
                        Bucket=self.bucket, Key=self.prefix + name, Body=content, IfNoneMatch="*"
                    )
                except aws.ClientError as error:
                    if _code(error) in _TAKEN:
                        return False
                    # Two writers met at the same moment, and the server let neither through.
                    if _code(error) not in _UNDECIDED or attempt == RACE_ATTEMPTS - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
                else:
                    return True
        raise AssertionError("unreachable: the last attempt returns or raises")

    def replace(self, name: str, content: bytes) -> None:
        """Store `content` in place of whatever the name held, all or nothing."""
        with self._explained():
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None where there is none."""
        with self._explained(), _missing_allowed():
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            with contextlib.closing(answer["Body"]) as body:
                return bytes(body.read())
        return None

    def sha256(self, name: str) -> str | None:
        """Return the hash of an object's content as it is now, or None where there is none."""
        whole = hashlib.sha256()
        with self._explained(), _missing_allowed():
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            with contextlib.closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(READ_BYTES):
                    whole.update(chunk)
            return whole.hexdigest()
        return None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the complete objects whose names begin with `prefix`, sorted by name."""
        with self._explained():
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(self.prefix)
                    yield Entry(name, item["Size"], item["LastModified"])

    def delete(self, name: str) -> None:
        """Remove an object; do nothing where there is none."""
        with self._explained():
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def drafts(self) -> Iterator[Entry]:
        """Yield the multipart uploads that nobody completed; their size is not known."""
        with self._explained():
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Uploads", []):
                    name = item["Key"].removeprefix(self.prefix)
                    yield Entry(f"{name}?{item['UploadId']}", 0, item["Initiated"])

    def delete_draft(self, name: str) -> None:
        """Abort a multipart upload that nobody completed."""
        key, _, upload = name.partition("?")
        with self._explained(), contextlib.suppress(self.client.exceptions.NoSuchUpload):
            self.client.abort_multipart_upload(
                Bucket=self.bucket, Key=self.prefix + key, UploadId=upload
            )

    def _size(self, name: str) -> int | None:
        with _missing_allowed():
            head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
            return int(head["ContentLength"])
        return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (aws.BotoCoreError, aws.ClientError, Boto3Error) as error:
            raise explain(error, self.url, str(self.client.meta.endpoint_url)) from error


def explain(error: Exception, url: str, endpoint: str) -> StoreError:
    """Return the error of boto3 as one that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, _NO_CREDENTIALS):
        return StoreError(
            f"{url}: S3 credentials are missing ({text}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    status, code = 0, ""
    if isinstance(error, aws.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = _code(error)
    unreachable = isinstance(error, (*_UNREACHABLE, Boto3Error)) or status >= 500
    if unreachable or code in ("SlowDown", "RequestTimeout"):
        return StoreUnreachableError(
            f"{url}: the S3 server {endpoint} does not answer, after several tries ({text}); "
            "start it, or check AWS_ENDPOINT_URL_S3 and the network, then run again: a rerun "
            "continues where this one stopped"
        )
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return StoreError(
            f"{url}: the S3 server {endpoint} has no bucket {bucket!r}; create it, or correct "
            "STILLROOM_STORE"
        )
    if status in (401, 403) or code in _WRONG_CREDENTIALS:
        return StoreError(
            f"{url}: the S3 server {endpoint} refuses the credentials ({text}); check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and that they may read and write this bucket"
        )
    return StoreError(f"{url}: the S3 server {endpoint} refuses: {text}")


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _missing_allowed() -> Iterator[None]:
    """Leave the block where the object is not there; a missing bucket is still an error."""
    try:
        yield
    except aws.ClientError as error:
        if _code(error) not in _MISSING:
            raise


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _timeout() -> float:
    text = os.environ.get("STILLROOM_S3_TIMEOUT", "60")
    try:
        return float(text)
    except ValueError:
        raise StoreError(
            f"STILLROOM_S3_TIMEOUT must be a number of seconds, such as 60: {text!r} came"
        ) from None
