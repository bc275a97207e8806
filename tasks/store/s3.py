"""A store in an S3 bucket, through boto3; credentials and endpoint come from the environment.

Every object bears the SHA-256 of its content, and whoever reads it compares: what was changed on
the way is asked for again.
"""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import botocore.exceptions as aws
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.parsers import ResponseParserError

from stillroom.checkpoint import sha256_of
from stillroom.errors import CorruptedError
from tasks.store.backend import Entry
from tasks.store.local import explained_disk
from tasks.store.s3_client import code_of, explain, s3_client
from tasks.store.verify import REPAIR

PART_BYTES = 16 * 2**20
READ_BYTES = 2**20
REQUESTS = 8
RACE_ATTEMPTS = 5
READ_ATTEMPTS = 5
_SHA256 = "stillroom-sha256"  # among an object's metadata

_MISSING = ("404", "NoSuchKey", "NotFound")
_TAKEN = ("412", "PreconditionFailed")
_CUT_OFF = (aws.IncompleteReadError, aws.ResponseStreamingError)
_UNDECIDED = ("409", "ConditionalRequestConflict", "OperationAborted")
T = TypeVar("T")


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

    @property
    def requests(self) -> int:
        """Several: most of a small file's time goes by between a request and its answer."""
        return REQUESTS

    def get(self, name: str, target: Path, *, share: bool = False) -> bool:
        """Write an object to the file `target`; return False where there is none."""
        with explained_disk(f"{target} cannot be written"), self._explained():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _missing_allowed():
                return self._until_sound(name, lambda: self._download(name, target))
        return False

    def put_file(self, name: str, source: Path) -> None:
        """Store a file under a name that stands for its content."""
        with explained_disk(f"{source} cannot be read"), self._explained():
            if self._size(name) == source.stat().st_size:
                return
            extra = {"Metadata": {_SHA256: sha256_of(source)}}
            with source.open("rb") as file:
                self.client.upload_fileobj(
                    file, self.bucket, self.prefix + name, ExtraArgs=extra, Config=self.transfer
                )

    def put_if_absent(self, name: str, content: bytes) -> bool:
        """Store `content` unless the name is taken; return whether it was free.

        A put that is sent again because its answer was lost finds its own object, and reports
        the name as taken: whoever adopts what is there reads the same bytes.
        """
        for attempt in range(RACE_ATTEMPTS):
            with self._explained():
                try:
                    self._put(name, content, IfNoneMatch="*")
                except aws.ClientError as error:
                    if code_of(error) in _TAKEN:
                        return False
                    # Two writers met at the same moment, and the server let neither through.
                    if code_of(error) not in _UNDECIDED or attempt == RACE_ATTEMPTS - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
                else:
                    return True
        raise AssertionError("unreachable: the last attempt returns or raises")

    def replace(self, name: str, content: bytes) -> None:
        """Store `content` in place of whatever the name held, all or nothing."""
        with self._explained():
            self._put(name, content)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None where there is none."""
        with self._explained(), _missing_allowed():
            return self._until_sound(name, lambda: self._read(name))
        return None

    def sha256(self, name: str) -> str | None:
        """Return the hash of an object's content as it is now, or None where there is none."""
        with self._explained(), _missing_allowed():
            for _ in range(READ_ATTEMPTS):
                answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
                whole = hashlib.sha256()
                with contextlib.closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(READ_BYTES):
                        whole.update(chunk)
                if answer["Metadata"].get(_SHA256, whole.hexdigest()) == whole.hexdigest():
                    break
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

    def _put(self, name: str, content: bytes, **condition: str) -> None:
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.prefix + name,
            Body=content,
            Metadata={_SHA256: hashlib.sha256(content).hexdigest()},
            **condition,
        )

    def _download(self, name: str, target: Path) -> tuple[bool, str, str]:
        place = {"Bucket": self.bucket, "Key": self.prefix + name}
        answer = self.client.get_object(**place)
        with contextlib.closing(answer["Body"]) as body:
            if answer["ContentLength"] <= self.transfer.multipart_chunksize:
                with target.open("wb") as file:
                    shutil.copyfileobj(body, file, READ_BYTES)
            else:
                self.client.download_file(*place.values(), str(target), Config=self.transfer)
        found = sha256_of(target)
        return True, found, answer["Metadata"].get(_SHA256, found)

    def _read(self, name: str) -> tuple[bytes, str, str]:
        answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
        with contextlib.closing(answer["Body"]) as body:
            content = bytes(body.read())
        found = hashlib.sha256(content).hexdigest()
        return content, found, answer["Metadata"].get(_SHA256, found)

    def _until_sound(self, name: str, read: Callable[[], tuple[T, str, str]]) -> T:
        """Return what `read` gives beside the hash of what came and the hash that was stored.

        Raises:
            CorruptedError: they differ, however often it is read.
        """
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                result, found, said = read()
            except _CUT_OFF:
                if attempt == READ_ATTEMPTS:
                    raise
                continue
            if found == said:
                return result
        raise CorruptedError(
            f"{self.url}/{name} is not what was stored: expected SHA-256 {said[:12]}…, "
            f"{found[:12]}… came {READ_ATTEMPTS} times; run `{REPAIR}`, which removes what is "
            "broken, then run again: it is made anew"
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
        except (aws.BotoCoreError, aws.ClientError, Boto3Error, ResponseParserError) as error:
            raise explain(error, self.url, str(self.client.meta.endpoint_url)) from error


@contextlib.contextmanager
def _missing_allowed() -> Iterator[None]:
    """Leave the block where the object is not there; a missing bucket is still an error."""
    try:
        yield
    except aws.ClientError as error:
        if code_of(error) not in _MISSING:
            raise
