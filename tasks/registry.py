"""Registered models: a base and each adapter as versions of their own, and the alias that moves.

A version is registered whether its gates passed or not, and says which; only `move_alias` makes it
the one that others get.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from stillroom.contents import BaseReference, Contents, Kind, Task, list_files
from stillroom.errors import MismatchError, ServiceUnreachableError, SourceError
from stillroom.pull import fetch, find, reaching
from tasks.tracking import TAG_KEY, TAG_KIND, connect

TAG_BASE_KEY = "stillroom.base_key"
TAG_BASE = "stillroom.base"
TAG_CONTENT = "stillroom.content_sha256"
TAG_GATES = "stillroom.gates"
TAG_LICENCE = "stillroom.licence"
TAG_TASK = "stillroom.task"

READY_SECONDS = 600
LOCK_SUFFIX = ".lock"
LOCK_OWNER = "stillroom.lock_owner"
LOCK_EXPIRES_AFTER_SECONDS = 300.0
LOCK_WAIT_SECONDS = 330.0
VERSIONS_AT_ONCE = 1000


@dataclass(frozen=True)
class Candidate:
    """A finished model folder, and what its registered version is to say of it."""

    name: str
    """Name of the registered model."""
    folder: Path
    """A Hugging Face checkpoint, or an adapter as peft writes it."""
    task: Task
    artifact_key: str
    run_id: str
    """Run whose experiment keeps the files."""
    licence: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Registered:
    """A registered version; `created` is False where it had been there before."""

    name: str
    version: str
    artifact_key: str
    created: bool

    @property
    def uri(self) -> str:
        """Its reference."""
        return f"models:/{self.name}/{self.version}"


def register_base(client: Any, candidate: Candidate) -> Registered:
    """Register a model folder; return the version that holds the same artifact if there is one.

    Raises:
        SourceError: the folder is empty.
        ServiceUnreachableError: MLflow stopped answering.
    """
    return _register(client, candidate, "base", None)


def register_adapter(client: Any, candidate: Candidate, base: Registered) -> Registered:
    """Register an adapter on a registered base; its files are the adapter's few megabytes alone.

    Raises:
        SourceError: the folder or the base cannot be read.
        ServiceUnreachableError: MLflow stopped answering.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-") as scratch:
        files = _listed(client, base, Path(scratch)).files
    reference = BaseReference(base.name, base.version, base.artifact_key, files)
    return _register(client, candidate, "adapter", reference)


def tag_gates(client: Any, registered: Registered, failed: list[str]) -> None:
    """Write on a version whether its gates passed, and which failed."""
    verdict = {TAG_GATES: "failed" if failed else "passed"}
    if failed:
        verdict["stillroom.gates_failed"] = ", ".join(failed)[:5000]
    with reaching(client.tracking_uri):
        for name, value in verdict.items():
            client.set_model_version_tag(registered.name, registered.version, name, value)


def champion(client: Any, name: str, alias: str) -> Registered | None:
    """Return the version that bears the alias now, or None."""
    from mlflow.exceptions import MlflowException

    try:
        with reaching(client.tracking_uri):
            found = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return Registered(name, str(found.version), found.tags.get(TAG_KEY, ""), created=False)


def move_alias(
    client: Any, registered: Registered, alias: str, compared_with: Registered | None
) -> None:
    """Let `alias` name a version that passed its gates, under the model's lock.

    The comparison behind the gates takes minutes and holds no lock; so this moves the alias only
    if the champion is still the one that the version was compared with.

    Raises:
        MismatchError: another champion came in between.
    """
    with model_lock(client, registered.name):
        now = champion(client, registered.name, alias)
        if now is not None and now.version == registered.version:
            return
        before, after = (item.version if item else "none" for item in (compared_with, now))
        if before != after:
            raise MismatchError(
                f"{registered.uri} was compared with version {before} of {registered.name}, and "
                f"@{alias} is version {after} by now: run again to compare with that one"
            )
        with reaching(client.tracking_uri):
            client.set_registered_model_alias(registered.name, alias, registered.version)


@contextmanager
def model_lock(
    client: Any, name: str, *, wait_seconds: float = LOCK_WAIT_SECONDS
) -> Iterator[None]:
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


def registered_keys(client: Any) -> set[str]:
    """Return the artifact keys of all registered versions and of the bases they sit on.

    Raises:
        ServiceUnreachableError: MLflow cannot be asked, so nothing is known to be unregistered.
    """
    from mlflow.exceptions import MlflowException

    keys: set[str] = set()
    token = None
    try:
        while True:
            page = client.search_model_versions(max_results=VERSIONS_AT_ONCE, page_token=token)
            for version in page:
                keys |= {
                    version.tags[tag] for tag in (TAG_KEY, TAG_BASE_KEY) if tag in version.tags
                }
            token = page.token
            if not token:
                return keys - {""}
    except MlflowException as error:
        raise ServiceUnreachableError(
            f"MLflow did not say which artifacts are registered ({str(error)[:200]}): nothing may "
            "be removed until it does"
        ) from error


def find_version(reference: str) -> tuple[str, str, str] | None:
    """Return name, version and content identity of a registered reference, or None.

    Raises:
        ServiceUnreachableError: MLflow does not answer.
    """
    client = _here()
    try:
        version = find(client, reference)
    except SourceError:
        return None
    with reaching(client.tracking_uri):
        found = client.get_model_version(version.name, version.version)
    identity = found.tags.get(TAG_CONTENT) or f"{version}:{found.source}"
    return version.name, version.version, identity


def download_version(reference: str, folder: Path) -> Path:
    """Return a folder with the verified files of a registered base.

    Raises:
        SourceError: there is no such version, or it is an adapter.
    """
    client = _here()
    target = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if fetch(client, find(client, reference), target).kind != "base":
        raise SourceError(f"{reference} is an adapter; name the model it sits on, or a merged one")
    return target


def _here() -> Any:
    from tasks.settings import Settings

    return connect(Settings().tracking_uri)


def _register(
    client: Any, candidate: Candidate, kind: Kind, base: BaseReference | None
) -> Registered:
    found = _registered_before(client, candidate)
    if found is not None:
        return found
    files = list_files(candidate.folder)
    if not files:
        raise SourceError(f"{candidate.folder} holds no files to register")
    contents = Contents(
        kind, candidate.task, candidate.artifact_key, candidate.licence, files, base
    )
    with reaching(client.tracking_uri):
        _ensure_model(client, candidate.name)
        logged = _upload(client, candidate, contents)
        # Two flows may have uploaded the same at once: the first to get here is kept.
        with model_lock(client, candidate.name):
            found = _registered_before(client, candidate)
            if found is not None:
                client.delete_logged_model(logged.model_id)
                return found
            version = client.create_model_version(
                candidate.name,
                logged.artifact_location,
                candidate.run_id,
                tags=_version_tags(candidate, contents),
                model_id=logged.model_id,
                await_creation_for=READY_SECONDS,
            )
    return Registered(candidate.name, str(version.version), candidate.artifact_key, created=True)


def _registered_before(client: Any, candidate: Candidate) -> Registered | None:
    with reaching(client.tracking_uri):
        versions = client.search_model_versions(
            f"name = '{candidate.name}' and tag.`{TAG_KEY}` = '{candidate.artifact_key}'"
        )
    for version in versions:
        if version.status == "READY":
            return Registered(
                candidate.name, str(version.version), candidate.artifact_key, created=False
            )
    return None


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _upload(client: Any, candidate: Candidate, contents: Contents) -> Any:
    from tasks.packaging import write_package

    experiment = client.get_run(candidate.run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment, candidate.name, candidate.run_id, tags=_version_tags(candidate, contents)
    )
    scratch = Path(tempfile.mkdtemp(prefix="stillroom-"))
    try:
        write_package(scratch / "package", contents, logged, candidate.run_id)
        client.log_model_artifacts(logged.model_id, str(candidate.folder), "artifacts/model")
        client.log_model_artifacts(logged.model_id, str(scratch / "package"))
        _log_metrics(client, candidate, logged.model_id)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    finally:
        shutil.rmtree(scratch)
    return client.finalize_logged_model(logged.model_id, "READY")


def _log_metrics(client: Any, candidate: Candidate, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput, Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(name, float(value), now, 0, model_id=model_id, run_id=candidate.run_id)
        for name, value in candidate.metrics.items()
    ]
    client.log_outputs(candidate.run_id, [LoggedModelOutput(model_id, 0)])
    if metrics:
        client.log_batch(candidate.run_id, metrics=metrics)


def _version_tags(candidate: Candidate, contents: Contents) -> dict[str, str]:
    tags = {
        **candidate.tags,
        TAG_KEY: candidate.artifact_key,
        TAG_KIND: contents.kind,
        TAG_TASK: candidate.task,
        TAG_LICENCE: candidate.licence,
        TAG_CONTENT: contents.sha256(),
    }
    if contents.base is not None:
        tags[TAG_BASE_KEY] = contents.base.artifact_key
        tags[TAG_BASE] = f"models:/{contents.base.name}/{contents.base.version}"
    return tags


def _listed(client: Any, registered: Registered, scratch: Path) -> Contents:
    from mlflow.artifacts import download_artifacts

    from stillroom.contents import LISTING, read_contents

    with reaching(client.tracking_uri):
        uri = client.get_model_version_download_uri(registered.name, registered.version)
        file = download_artifacts(
            artifact_uri=f"{uri}/artifacts/{LISTING}",
            dst_path=str(scratch),
            tracking_uri=client.tracking_uri,
        )
    return read_contents(Path(file))


def _acquire(client: Any, lock: str, owner: str, deadline: float) -> None:
    from mlflow.exceptions import MlflowException

    pause = 0.05
    while True:
        try:
            with reaching(client.tracking_uri):
                client.create_registered_model(lock, tags={LOCK_OWNER: owner})
                return
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        held = _lock(client, lock)
        if held is not None:
            age = time.time() - cast(int, held.creation_timestamp) / 1000
            if age > LOCK_EXPIRES_AFTER_SECONDS:
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
