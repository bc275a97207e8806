"""What one flow run writes down as it goes: an MLflow parent run, and a nested run a stage."""

import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect import get_run_logger
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from stillroom.config import IntrinsicDimension, Recipe
from stillroom.errors import ServiceUnreachableError, StillroomError, StoreError
from stillroom.evaluation.report_data import LineageEntry
from tasks.explain import explain
from tasks.failure import write_failure
from tasks.quiet_logs import hide_secrets_in_logs
from tasks.settings import Settings
from tasks.stages import Order
from tasks.store.lease import leave_lease, take_lease
from tasks.store.record import Record
from tasks.store.store import ArtifactStore, open_store
from tasks.tracking import (
    ParentRun,
    StageRecord,
    begin_parent_run,
    connect,
    end_parent_run,
    ensure_experiment,
    log_file,
    log_stage,
    run_link,
    suspend_parent_run,
)
from tasks.training_curves import read_curves

REQUESTS = 4
"""Cached stages that are written down at once, beside the flow: MLflow takes longer to answer than
it takes to look them up."""


class Journal:
    """The open run of one flow run, and the stages it has gone through.

    No dataclass: Prefect walks through those that a task is called with, and this one changes
    meanwhile.
    """

    def __init__(self, client: Any, parent: ParentRun, store: ArtifactStore) -> None:
        """Have as many writers as MLflow takes: SQLite's file has one at a time."""
        self.client = client
        self.parent = parent
        self.store = store
        self.lineage: list[LineageEntry] = []
        self.figures: dict[str, float] = {}
        self.under_way: dict[str, Order] = {}
        """Stages that have begun and are not written down as finished, by key."""
        self._cached: list[Future[str]] = []
        """Cached stages that may not be written down yet."""
        self._waits_until: datetime | None = None
        is_file = client.tracking_uri.startswith("sqlite:")
        self._pool = ThreadPoolExecutor(1 if is_file else REQUESTS)

    @classmethod
    def begin(cls, recipe: Recipe | IntrinsicDimension) -> "Journal":
        """Open the parent run of the flow run that is under way; a rerun finds it again.

        Raises:
            ServiceUnreachableError: MLflow does not answer.
            StoreError: the store cannot be reached.
        """
        hide_secrets_in_logs()
        try:
            return cls._open(recipe)
        except Exception as error:
            write_failure(error, explain(error, recipe.name))
            raise

    @classmethod
    def _open(cls, recipe: Recipe | IntrinsicDimension) -> "Journal":
        settings = Settings()
        store = open_store(settings.store_url)
        client = connect(settings.tracking_uri)
        experiment = ensure_experiment(client, recipe.name, settings.artifact_location)
        parent = begin_parent_run(
            client,
            experiment,
            flow_run_id=str(flow_run.id),
            name=str(flow_run.name),
            recipe=recipe.model_dump(mode="json"),
            git_commit=git_commit(),
        )
        return cls(client, parent, store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Pause):  # Prefect will begin the flow run anew
            self._tell_of(error, self._suspend)
            return
        if not self.parent.is_new:
            take_lease(self.store.backend, self.parent.flow_run_id)
        if error is not None:
            self._tell_of(error, self._fail)
            self._show_failure(error)
            return
        try:
            self.log_cached()
        except Exception as unwritten:
            self._tell_of(unwritten, self._fail)
            self._show_failure(unwritten)
            raise
        end_parent_run(self.client, self.parent, "FINISHED", metrics=self.figures)

    def wait_until(self, moment: datetime) -> None:
        """Have clean-ups spare the stages of a run that will be suspended until a moment."""
        self._waits_until = moment
        keys = [entry.key for entry in self.lineage]
        leave_lease(self.store.backend, self.parent.flow_run_id, keys, moment)

    def _suspend(self) -> None:
        self.log_cached()
        suspend_parent_run(self.client, self.parent, self._waits_until)

    def _fail(self) -> None:
        try:
            self.log_cached()
        finally:
            end_parent_run(self.client, self.parent, "FAILED", metrics={})

    def _show_failure(self, error: BaseException) -> None:
        """Leave a page about the failure with the flow run; whoever stops a run needs none."""
        if not isinstance(error, Exception):
            return
        explained = explain(error, str(flow_run.name))
        unfinished = {
            order.title: self._checkpoints(order.key, error) for order in self.under_way.values()
        }
        write_failure(error, explained, self.lineage, unfinished)

    def _checkpoints(self, key: str, failure: Exception) -> int | None:
        """Return how many checkpoints a stage has, or None where the store cannot be asked."""
        if isinstance(failure, StoreError):
            return None  # it was waited for long enough
        try:
            return len(self.store.checkpoints(key).names())
        except StoreError:
            return None

    @property
    def link(self) -> str:
        """Where MLflow's UI shows the run."""
        return run_link(self.client.tracking_uri, self.parent.experiment_id, self.parent.run_id)

    def begin_stage(self, order: Order) -> None:
        """Note a stage that is looked for, or made, from now on."""
        self.under_way[order.key] = order

    def log_stage(self, order: Order, record: Record, *, cached: bool) -> None:
        """Write down a stage that has its artifact; a cached one meanwhile: see `log_cached`."""
        seconds = record.metrics.get("seconds")
        self.lineage.append(LineageEntry(order.title, record.key, seconds, cached))
        curves = () if cached else read_curves(self.store, record)
        points = [
            (step, {curve.name: value})
            for curve in curves
            for step, value in zip(curve.steps, curve.values, strict=True)
        ]
        stage = StageRecord(
            name=order.title,
            key=record.key,
            kind=record.kind,
            cached=cached,
            params={} if cached else order.section,
            metrics=record.metrics,
            history=points,
        )
        if cached:
            self._cached.append(self._pool.submit(log_stage, self.client, self.parent, stage))
        else:
            log_stage(self.client, self.parent, stage)
        self.under_way.pop(record.key, None)

    def log_cached(self) -> None:
        """Return once all cached stages are written down."""
        with suppress(IndexError):
            while True:  # trials log from several threads: each stage is popped by one
                self._cached.pop(0).result()

    def log_failure(self, order: Order, error: StillroomError) -> None:
        """Write down a stage that failed."""
        stage = StageRecord(order.title, order.key, order.kind, False, "FAILED", error=str(error))
        self._tell_of(error, lambda: log_stage(self.client, self.parent, stage))

    def _tell_of(self, failure: BaseException, tell: Callable[[], object]) -> None:
        """Tell MLflow of a failure; where that fails too, the first failure is what counts."""
        if isinstance(failure, ServiceUnreachableError):
            return  # it was waited for long enough
        try:
            tell()
        except Exception as error:
            get_run_logger().warning(
                "MLflow was not told of the failure: %s", " ".join(str(error).split())[:300]
            )

    def log_file(self, path: Path) -> None:
        """Keep a small file with the run."""
        log_file(self.client, self.parent.run_id, path)


def git_commit() -> str:
    """Return the commit of the code that runs, or nothing outside a checkout."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
