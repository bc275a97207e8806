"""Runs of a Prefect deployment that a flow orders: started, awaited, and cancelled with it."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Event
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling

from stillroom.errors import RecipeError, ServiceUnreachableError, StageError

T = TypeVar("T")
POLL_SECONDS = 2.0
UNTAKEN_SECONDS = 600.0
"""How long runs may wait for a worker that takes the first of them, where none is at work."""
SILENT_SECONDS = 60.0
"""How long a server may be away: as long as Prefect's client asks again by itself."""


def start_run(
    deployment: str, name: str, parameters: dict[str, Any], *, setting: str, instead: str
) -> FlowRun:
    """Order a run of a deployment under a name; the flow run under way is shown as its parent.

    `setting` is what names the deployment in the recipe, `instead` what can be set in its place.

    Raises:
        RecipeError: the server has no such deployment.
        ServiceUnreachableError: the server does not answer.
    """
    # Asked twice, the server makes one run.
    asked = uuid.uuid4().hex

    def start() -> FlowRun:
        run: Any = run_deployment(
            deployment,
            parameters=parameters,
            flow_run_name=name,
            timeout=0,
            idempotency_key=asked,
        )
        found: FlowRun = run
        return found

    try:
        return _answered(start)
    except ObjectNotFound as error:
        raise RecipeError(
            f"{setting}: the Prefect server has no deployment {deployment}; register it with "
            "`prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml`, or take "
            f"{instead}"
        ) from error


def await_ends(
    runs: Sequence[FlowRun],
    deployment: str,
    title: str,
    *,
    stop: Event | None = None,
    look: Callable[[SyncPrefectClient], None] | None = None,
) -> "Iterator[State[Any]]":
    """Yield the last state of each run as it ends; `look` is called in between.

    Raises:
        StageError: no worker took a run, or `stop` was set.
        ServiceUnreachableError: the server does not answer any more.
    """
    stop, started, taken = stop or Event(), time.monotonic(), False
    waiting = [run.id for run in runs]
    # One client for all: once it was answered, it asks again while a server is away.
    with get_client(sync_client=True) as client:
        while waiting:
            for run_id in list(waiting):
                state = _state(client, run_id, title)
                taken = taken or not (state.is_scheduled() or state.is_pending())
                if state.is_final():
                    waiting.remove(run_id)
                    yield state
            if not taken and time.monotonic() - started > UNTAKEN_SECONDS:
                _require_work(client, runs, deployment, title)
            if look is not None:
                _answered(partial(look, client))
            if waiting and stop.wait(POLL_SECONDS):
                raise StageError(f"{title}: its run is cancelled, because the flow ends early")


def cancel_runs(runs: Sequence[FlowRun]) -> None:
    """Have runs that have not ended cancelled: whoever ordered them does not wait any more.

    Their checkpoints stay. Where the server does not answer they go on, and a rerun finds what
    they made.
    """
    try:
        with get_client(sync_client=True) as client:
            for run in runs:
                state = client.read_flow_run(run.id).state
                if state is None or not state.is_final():
                    # What no worker has begun, none will end.
                    begun = state is not None and not state.is_scheduled()
                    ended: State[Any] = Cancelling() if begun else Cancelled()
                    client.set_flow_run_state(run.id, ended, force=True)
    except (httpx.TransportError, ObjectNotFound) as error:
        get_run_logger().warning("runs could not be cancelled, and go on: %s", error)


def _state(client: SyncPrefectClient, run_id: UUID, title: str) -> "State[Any]":
    try:
        state = _answered(lambda: client.read_flow_run(run_id).state)
    except ObjectNotFound as error:
        raise StageError(f"{title}: its run was deleted from Prefect's server") from error
    assert state is not None  # a run that was ordered is scheduled
    return state


def _require_work(
    client: SyncPrefectClient, runs: Sequence[FlowRun], deployment: str, title: str
) -> None:
    """Go on waiting for a worker that is at work on something else.

    Raises:
        StageError: there is none.
    """
    pool = runs[0].work_pool_name or ""
    ours = [run.id for run in runs] + ([UUID(flow_run.id)] if flow_run.id else [])
    at_work = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    others = client.read_flow_runs(
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        flow_run_filter=FlowRunFilter(
            id=FlowRunFilterId(not_any_=ours),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=at_work)),
        ),
        limit=1,
    )
    workers = client.read_workers_for_work_pool(pool)
    if others and any(worker.status == WorkerStatus.ONLINE for worker in workers):
        return
    raise StageError(
        f"{title}: no worker took a run of {deployment} in {UNTAKEN_SECONDS:.0f} s; start one "
        f"with `prefect worker start --pool {pool}`, and give the pool room for this run besides "
        "the one that ordered it"
    )


def _answered(ask: Callable[[], T]) -> T:
    """Return what the server answers, where need be once it is back.

    Raises:
        ServiceUnreachableError: it stays away.
    """
    deadline = time.monotonic() + SILENT_SECONDS
    while True:
        try:
            return ask()
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise ServiceUnreachableError(
                    f"Prefect's server does not answer ({error}); start it and run again: what "
                    "the workers have made meanwhile is found"
                ) from error
            time.sleep(POLL_SECONDS)
