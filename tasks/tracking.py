"""What MLflow remembers of a flow run: one parent run, and a nested run for each stage.

A client is passed from call to call; nothing here touches MLflow's "active run".
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote

from stillroom.errors import RecipeError
from stillroom.pull import open_client, reaching
from stillroom.redaction import redact
from tasks.mlflow_batches import flatten, log_batches
from tasks.settings import Settings

Status = Literal["FINISHED", "FAILED", "KILLED"]

TIMEOUT_VARIABLE = "STILLROOM_MLFLOW_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 60.0

TAG_FLOW_RUN = "stillroom.flow_run_id"
TAG_ROLE = "stillroom.run"
TAG_STAGE = "stillroom.stage"
TAG_KEY = "stillroom.artifact_key"
TAG_KIND = "stillroom.kind"
TAG_CACHED = "stillroom.cached"
TAG_ERROR = "stillroom.error"
TAG_STATE = "stillroom.state"
TAG_WAITS_UNTIL = "stillroom.waits_until"
TAG_COMMIT = "mlflow.source.git.commit"
TAG_PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class ParentRun:
    """The run that stands for a flow run; small, and passed between tasks as it is."""

    run_id: str
    experiment_id: str
    flow_run_id: str
    git_commit: str = ""
    is_new: bool = field(default=False, compare=False)
    """Made just now: what `logged` does not name need not be searched for."""
    logged: set[str] = field(default_factory=set, compare=False)
    """Names of the stages that were logged through this object."""


@dataclass(frozen=True)
class StageRecord:
    """What is remembered of a stage."""

    name: str
    key: str
    kind: str
    cached: bool
    status: Status = "FINISHED"
    params: Mapping[str, Any] = field(default_factory=dict)
    """The section of the recipe, nested as it is."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Each name carries its unit."""
    history: Iterable[tuple[int, Mapping[str, float]]] = ()
    """Curves: step and what was measured there."""
    files: tuple[Path, ...] = ()
    """Small files or folders to keep with the run."""
    error: str = ""
    """Why it failed."""


def connect(tracking_uri: str) -> Any:
    """Return an MlflowClient once MLflow answers, and let this process find MLflow there.

    Waits STILLROOM_MLFLOW_TIMEOUT seconds (60 if unset) for a server; sqlite:/// needs none.

    Raises:
        ServiceUnreachableError: the server does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Two lines and a request for every run that ends; the flow says where its parent run is.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # It writes a traceback for what it raises all the same: a full disk, a read-only file.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # 2 + 4 + 8 + 16 seconds between the tries; MLflow's own 7 retries last for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    # About a minute for MLflow's own S3 client as well, which gives up after some seconds.
    os.environ.setdefault("AWS_RETRY_MODE", "standard")
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "10")
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # Loading models:/ and files behind a server reads these, not the client.
    os.environ["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_REGISTRY_URI"] = tracking_uri
    for name, value in Settings().logins().items():
        os.environ.setdefault(name, value)
    timeout = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_SECONDS))
    return open_client(tracking_uri, wait_seconds=timeout)


def ensure_experiment(client: Any, name: str, artifact_location: str | None = None) -> str:
    """Return the id of the experiment `name`; make it where there is none.

    Its runs' files go to `artifact_location` directly from the client. An experiment that exists
    keeps the location it has. Of two processes that make it at once, both get the same.

    Raises:
        RecipeError: an experiment of that name was deleted.
    """
    from mlflow.exceptions import MlflowException

    with reaching(client.tracking_uri):
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return cast(str, client.create_experiment(name, artifact_location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise RecipeError(
            f"the MLflow experiment {name!r} is deleted: restore it with `mlflow experiments "
            f"restore --experiment-id {found.experiment_id}`, or give the recipe another name"
        )
    return cast(str, found.experiment_id)


def begin_parent_run(
    client: Any,
    experiment_id: str,
    *,
    flow_run_id: str,
    name: str,
    recipe: Mapping[str, Any],
    git_commit: str = "",
    tags: Mapping[str, str] | None = None,
) -> ParentRun:
    """Return the run that stands for a flow run; a rerun of it finds the one it made before.

    The recipe becomes parameters, and the file recipe.yaml; credentials are taken out of both.
    """
    from mlflow.entities import RunStatus

    parent_tags = {TAG_FLOW_RUN: flow_run_id, TAG_ROLE: "parent"}
    with reaching(client.tracking_uri):
        found = _find_run(client, experiment_id, parent_tags)
        if found is not None:
            client.update_run(found.info.run_id, RunStatus.to_string(RunStatus.RUNNING))
            for tag in {TAG_STATE, TAG_WAITS_UNTIL} & set(found.data.tags):
                client.delete_tag(found.info.run_id, tag)
            return ParentRun(found.info.run_id, experiment_id, flow_run_id, git_commit)
        all_tags = {**_clean_tags(tags or {}), **parent_tags, **_commit_tag(git_commit)}
        run = client.create_run(experiment_id, run_name=name, tags=all_tags)
        log_batches(client, run.info.run_id, flatten(recipe), {}, ())
        _log_recipe(client, run.info.run_id, recipe)
    return ParentRun(run.info.run_id, experiment_id, flow_run_id, git_commit, is_new=True)


def log_stage(client: Any, parent: ParentRun, record: StageRecord) -> str:
    """Return the id of the nested run for a stage, with everything in `record` logged.

    A rerun finds the stage's run again: a finished one is left as it is, another is gone over.
    """
    identity = {TAG_PARENT: parent.run_id, TAG_STAGE: record.name}
    with reaching(client.tracking_uri):
        fresh = parent.is_new and record.name not in parent.logged
        run = None if fresh else _find_run(client, parent.experiment_id, identity)
        parent.logged.add(record.name)
        tags = {
            **identity,
            TAG_FLOW_RUN: parent.flow_run_id,
            TAG_ROLE: "stage",
            TAG_KEY: record.key,
            TAG_KIND: record.kind,
            TAG_CACHED: str(record.cached).lower(),
            **_commit_tag(parent.git_commit),
            **({TAG_ERROR: redact(record.error)[:5000]} if record.error else {}),
        }
        params = dict(flatten(record.params))
        if run is None:
            run = client.create_run(parent.experiment_id, run_name=record.name, tags=tags)
        elif run.info.status == "FINISHED" and run.data.tags.get(TAG_KEY) == record.key:
            return cast(str, run.info.run_id)
        else:
            # A parameter that is there already cannot be changed.
            params = {name: value for name, value in params.items() if name not in run.data.params}
            log_batches(client, run.info.run_id, {}, {}, (), tags)
        run_id = cast(str, run.info.run_id)
        log_batches(client, run_id, params, record.metrics, record.history)
        for path in record.files:
            log_file(client, run_id, path)
        client.set_terminated(run_id, record.status)
    return run_id


def end_parent_run(
    client: Any,
    parent: ParentRun,
    status: Status,
    *,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Close the run of a flow run, with the figures and links that sum it up."""
    with reaching(client.tracking_uri):
        if metrics or tags:
            log_batches(client, parent.run_id, {}, metrics or {}, (), _clean_tags(tags or {}))
        client.set_terminated(parent.run_id, status)


def suspend_parent_run(client: Any, parent: ParentRun, until: datetime | None) -> None:
    """Say of the run of a suspended flow run that it is to go on, and until when it waits."""
    tags = {TAG_STATE: "suspended"}
    if until is not None:
        tags[TAG_WAITS_UNTIL] = until.isoformat(timespec="seconds")
    with reaching(client.tracking_uri):
        log_batches(client, parent.run_id, {}, {}, (), tags)
        client.update_run(parent.run_id, "SCHEDULED")


def log_file(client: Any, run_id: str, path: Path) -> None:
    """Keep a small file or folder with a run, such as report.html, under its own name."""
    with reaching(client.tracking_uri):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), path.name)
        else:
            client.log_artifact(run_id, str(path))


def run_link(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """Return the page of a run in MLflow's UI; where no server runs, how to start one."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    if tracking_uri.startswith(("http://", "https://")):
        return f"{redact(tracking_uri).rstrip('/')}/{page}"
    return f"`mlflow server --backend-store-uri {redact(unquote(tracking_uri))}`, then {page}"


def _find_run(client: Any, experiment_id: str, tags: Mapping[str, str]) -> Any:
    conditions = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = client.search_runs(
        [experiment_id], conditions, max_results=1, order_by=["attributes.start_time ASC"]
    )
    return found[0] if found else None


def _log_recipe(client: Any, run_id: str, recipe: Mapping[str, Any]) -> None:
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(redact(yaml.safe_dump(_plain(recipe), sort_keys=False)))
        client.log_artifact(run_id, str(file))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: redact(value)[:5000] for name, value in tags.items()}


def _commit_tag(git_commit: str) -> dict[str, str]:
    return {TAG_COMMIT: git_commit} if git_commit else {}
