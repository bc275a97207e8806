"""The S3 client: where it connects to, how often it tries, and what its errors mean."""

import os
import time
from typing import Any

import boto3
import botocore.exceptions as aws
from boto3.exceptions import Boto3Error
from botocore.config import Config

from stillroom.errors import StoreError, StoreUnreachableError

ATTEMPTS = 5
BACKOFF_SECONDS = 15.0  # botocore's standard mode waits at most 1 + 2 + 4 + 8 s between 5 attempts
PAUSE_SECONDS = 1.0

_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)
# A server that is being started again.
_REFUSED = (aws.EndpointConnectionError, aws.ConnectionClosedError)
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
        client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise StoreError(
            f"the S3 endpoint {endpoint!r} is not an address; set AWS_ENDPOINT_URL_S3 to one like "
            "http://127.0.0.1:9000, or unset it for Amazon's own"
        ) from error
    client.meta.events.register_first("needs-retry.s3", _Patience(seconds))
    return client


class _Patience:
    """Has a request that is refused tried again until some seconds have gone by.

    Botocore's own five attempts may all be over within seconds: its pauses are drawn from zero on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(
        self,
        request_dict: dict[str, Any],
        caught_exception: Exception | None = None,
        **_: Any,
    ) -> float | None:
        """Return the seconds until the next attempt, or None to leave it to botocore."""
        if not isinstance(caught_exception, _REFUSED):
            return None
        now = time.monotonic()
        since: float = request_dict["context"].setdefault("refused since", now)
        left = self.seconds - (now - since)
        return min(PAUSE_SECONDS, left) if left > 0 else None


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
        code = code_of(error)
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


def code_of(error: aws.ClientError) -> str:
    """Return the word by which S3 calls an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


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
