"""Have stages made by workers of a deployment, and take what they made from the store."""

from collections.abc import Mapping
from threading import Event
from types import TracebackType
from typing import Any, Self

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, State

from stillroom.config import Execution
from stillroom.errors import StageError, StoreError
from stillroom.progress import Progress
from tasks.elsewhere import await_ends, cancel_runs, start_run
from tasks.errand import ELSEWHERE, SAME_STORE, Errand
from tasks.stages import Order
from tasks.store.record import Record
from tasks.store.store import ArtifactStore

SETTINGS = {"setting": "execution.deployment", "instead": "execution.over: here"}


class Workers:
    """Where `execution.over: workers` has stages made.

    As a context it ends what other threads wait for, where the block ends with an error.
    """

    def __init__(self, execution: Execution, store: ArtifactStore) -> None:
        self.execution = execution
        self.store = store
        self._stop = Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stop.set()

    def take(self, order: Order) -> bool:
        """Return whether they make what is ordered."""
        return self.execution.over == "workers" and order.stage in ELSEWHERE

    def make(self, order: Order, records: Mapping[str, Record], progress: Progress) -> Record:
        """Return the record of the artifact that a worker made.

        A run that is lost with its worker is ordered once more: it goes on from the checkpoints.

        Raises:
            StageError: the work failed, was cancelled, or was lost twice.
            StoreError: the worker left it in another store.
        """
        title = order.title
        errand = Errand.of(order, records, self.execution.threads)
        state = self._run(errand, progress)
        if state.is_crashed():
            get_run_logger().warning("%s: its run was lost, once more: %s", title, state.message)
            state = self._run(errand, progress)
        if state.is_crashed():
            raise StageError(
                f"{title}: two runs of it were lost, perhaps because memory ran out "
                f"({state.message}); what they finished is kept: look after the workers of "
                f"{self.execution.deployment} and run again"
            )
        if not state.is_completed():
            raise StageError(state.message or f"{title}: its run ended as {state.name}")
        record = self.store.find(order.kind, order.key)
        if record is None:
            raise StoreError(
                f"{title}: the worker {state.message}, and the store of the flow is "
                f"{self.store.url}, where it is not; {SAME_STORE}"
            )
        return record

    def _run(self, errand: Errand, progress: Progress) -> "State[Any]":
        deployment, title = self.execution.deployment, errand.order.title
        runs: list[FlowRun] = []

        def look(client: SyncPrefectClient) -> None:
            _pass_on(client, runs[0], progress)

        parameters = {"errand": errand.model_dump(mode="json")}
        try:
            runs.append(start_run(deployment, title, parameters, **SETTINGS))
            (state,) = await_ends(runs, deployment, title, stop=self._stop, look=look)
            return state
        finally:
            cancel_runs(runs)


def _pass_on(client: SyncPrefectClient, run: FlowRun, progress: Progress) -> None:
    """Show here how far a run is, as it shows it itself."""
    shown = client.read_artifacts(
        artifact_filter=ArtifactFilter(type=ArtifactFilterType(any_=["progress"])),
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
    )
    for artifact in shown:
        if isinstance(artifact.data, int | float):
            progress(round(artifact.data), 100, "%")
