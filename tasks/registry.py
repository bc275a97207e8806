"""Registered models: a base and each adapter as versions of their own, and the alias that moves.

A version is registered whether its gates passed or not, and says which; only `move_alias` makes it
the one that others get.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillroom.checkpoint import files_below
from stillroom.contents import BaseReference, Contents, Kind, Task, list_files
from stillroom.errors import CorruptedError, MismatchError, SourceError
from stillroom.pull import ATTEMPTS, Version, download, reaching
from tasks.model_lock import model_lock
from tasks.tracking import TAG_KEY, TAG_KIND

TAG_BASE_KEY = "stillroom.base_key"
TAG_BASE = "stillroom.base"
TAG_CONTENT = "stillroom.content_sha256"
TAG_GATES = "stillroom.gates"
TAG_GATES_FAILED = "stillroom.gates_failed"
TAG_LICENCE = "stillroom.licence"
TAG_TASK = "stillroom.task"

READY_SECONDS = 600
UPLOADS = 8
"""Files of a version that are on their way at once."""


@dataclass(frozen=True)
class Candidate:
    """A finished model folder, and what its registered version is to say of it."""

    name: str
    """Name of the registered model."""
    folder: Path
    """A Hugging Face checkpoint, or an adapter's folder."""
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
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What the version said of itself when it was found."""

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


def find_registered(
    client: Any, name: str, artifact_key: str, base: str | None = None
) -> Registered | None:
    """Return the version of `name` that holds an artifact, or None.

    An adapter is one only on the version that `base` refers to: another may have been deleted.
    """
    with reaching(client.tracking_uri):
        versions = client.search_model_versions(
            f"name = '{name}' and tag.`{TAG_KEY}` = '{artifact_key}'"
        )
    for version in versions:
        if version.status == "READY" and version.tags.get(TAG_BASE) == base:
            return Registered(
                name, str(version.version), artifact_key, created=False, tags=version.tags
            )
    return None


def tag_gates(client: Any, registered: Registered, failed: list[str]) -> None:
    """Write on a version whether its gates passed, and which failed."""
    verdict = {TAG_GATES: "failed" if failed else "passed"}
    if failed:
        verdict[TAG_GATES_FAILED] = ", ".join(failed)[:5000]
    with reaching(client.tracking_uri):
        for name, value in verdict.items() - registered.tags.items():
            client.set_model_version_tag(registered.name, registered.version, name, value)
        for name in {TAG_GATES_FAILED} & registered.tags.keys() - verdict.keys():
            client.delete_model_version_tag(registered.name, registered.version, name)


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
    if _bears(champion(client, registered.name, alias), registered):
        return  # nothing to move, so nothing to lock
    with model_lock(client, registered.name):
        now = champion(client, registered.name, alias)
        if _bears(now, registered):
            return
        before, after = (item.version if item else "none" for item in (compared_with, now))
        if before != after:
            raise MismatchError(
                f"{registered.uri} was compared with version {before} of {registered.name}, and "
                f"@{alias} is version {after} by now: run again to compare with that one"
            )
        with reaching(client.tracking_uri):
            client.set_registered_model_alias(registered.name, alias, registered.version)


def _bears(now: Registered | None, registered: Registered) -> bool:
    return now is not None and now.version == registered.version


def _register(
    client: Any, candidate: Candidate, kind: Kind, base: BaseReference | None
) -> Registered:
    uri = _uri(base) if base else None
    found = find_registered(client, candidate.name, candidate.artifact_key, uri)
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
            found = find_registered(client, candidate.name, candidate.artifact_key, uri)
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
        _log_files(client, logged.model_id, candidate.folder, Path("artifacts/model"))
        _log_files(client, logged.model_id, scratch / "package", Path())
        _log_metrics(client, candidate, logged.model_id)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    finally:
        shutil.rmtree(scratch)
    return client.finalize_logged_model(logged.model_id, "READY")


def _log_files(client: Any, model_id: str, folder: Path, place: Path) -> None:
    """Upload what lies below a folder; MLflow's own call has one file wait for the other."""

    def upload(file: Path) -> None:
        parent = (place / file.relative_to(folder)).parent.as_posix()
        client.log_model_artifact(model_id, str(file), None if parent == "." else parent)

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(upload, files_below(folder)))


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
        tags[TAG_BASE] = _uri(contents.base)
    return tags


def _uri(base: BaseReference) -> str:
    return f"models:/{base.name}/{base.version}"


def _listed(client: Any, registered: Registered, scratch: Path) -> Contents:
    from stillroom.contents import LISTING, read_contents

    with reaching(client.tracking_uri):
        version = client.get_model_version(registered.name, registered.version)
    place = Version(registered.name, registered.version)
    for _ in range(ATTEMPTS):
        with contextlib.suppress(CorruptedError):  # not as it was listed: asked for again
            contents = read_contents(download(client, place, f"artifacts/{LISTING}", scratch))
            if contents.sha256() == version.tags.get(TAG_CONTENT):
                return contents
    raise CorruptedError(
        f"{registered.uri}: its {LISTING} does not list what was registered, {ATTEMPTS} times; "
        "register the model again"
    )
