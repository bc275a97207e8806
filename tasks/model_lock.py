"""One lock a registered model, held where the registry is, so that it works from any machine."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from stillroom.errors import ServiceUnreachableError
from stillroom.pull import reaching

LOCK_SUFFIX = ".lock"
LOCK_OWNER = "stillroom.lock_owner"
EXPIRES_AFTER_SECONDS = 300.0
WAIT_SECONDS = 330.0


@contextmanager
def model_lock(client: Any, name: str, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of a registered model; it works wherever the registry is reached.

    The lock is a registered model NAME.lock without versions: the registry's database lets only
    one of many create it. One that a killed process left behind is taken down after five minutes,
    far longer than any holder needs.

    Raises:
        ServiceUnreachableError: someone else held it all the time.
    """
    owner = uuid.uuid4().hex
    _acquire(client, f"{name}{LOCK_SUFFIX}", owner, time.monotonic() + wait_seconds)
    try:
        yield
    finally:
        _release(client, f"{name}{LOCK_SUFFIX}", owner)


def _acquire(client: Any, lock: str, owner: str, deadline: float) -> None:
    from mlflow.exceptions import MlflowException

    pause = 0.05
    while True:
        try:
            with reaching(client.tracking_uri):
                client.create_registered_model(lock, tags={LOCK_OWNER: owner})
                return
        except MlflowException as error:
            # MLflow reads the one that was there first; released meanwhile, it is not found.
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        held = _lock(client, lock)
        if held is not None:
            age = time.time() - cast(int, held.creation_timestamp) / 1000
            if age > EXPIRES_AFTER_SECONDS:
                _release(client, lock, held.tags.get(LOCK_OWNER, ""))
                continue
        if time.monotonic() > deadline:
            raise ServiceUnreachableError(
                f"another run is publishing to {lock.removesuffix(LOCK_SUFFIX)} and did not "
                f"finish; run again, or delete the registered model {lock} if no run is at work"
            )
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _release(client: Any, lock: str, owner: str) -> None:
    with reaching(client.tracking_uri):
        held = _lock(client, lock)
        if held is not None and held.tags.get(LOCK_OWNER, "") == owner:
            client.delete_registered_model(lock)


def _lock(client: Any, lock: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        with reaching(client.tracking_uri):
            return client.get_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
