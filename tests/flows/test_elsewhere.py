"""Runs that a flow orders of a deployment: how long they are waited for, and how they end."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Running, Scheduled

from flows.make_stage import make_stage
from stillroom.config import Execution
from stillroom.errors import ServiceUnreachableError, StageError, StoreError
from stillroom.progress import silent
from tasks import elsewhere, workers
from tasks.elsewhere import await_ends, cancel_runs, start_run
from tasks.errand import Errand
from tasks.stages import QUANTIZE_MODEL, Order
from tasks.store.store import ArtifactStore, open_store
from tasks.workers import Workers

ORDER = Order(title="quantize", stage=QUANTIZE_MODEL, section={}, seed=0)
PARAMETERS = {"errand": Errand.of(ORDER, {}, None).model_dump(mode="json")}
SETTINGS = {"setting": "execution.deployment", "instead": "execution.over: here"}


@pytest.fixture
def client(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.setattr(elsewhere, "UNTAKEN_SECONDS", 0.5)
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0.1)
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as opened:
        yield opened


@pytest.fixture
def deployment(client: SyncPrefectClient, tmp_path: Path) -> str:
    """A deployment on a pool of its own, to whose worker one can pretend."""
    pool = tmp_path.name
    client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    make_stage.from_source(
        source=str(Path(__file__).parents[2]), entrypoint="flows/make_stage.py:make_stage"
    ).deploy(pool, work_pool_name=pool, print_next_steps=False)
    return f"make-stage/{pool}"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


def begin(deployment: str) -> FlowRun:
    return start_run(deployment, "quantize", PARAMETERS, **SETTINGS)


@pytest.mark.integration
def test_a_worker_at_work_is_waited_for(client: SyncPrefectClient, deployment: str) -> None:
    pool = deployment.partition("/")[2]
    client.send_worker_heartbeat(pool, "busy", heartbeat_interval_seconds=30)
    other, run = begin(deployment), begin(deployment)
    client.set_flow_run_state(other.id, Running(), force=True)
    looks = 0

    def look(_: SyncPrefectClient) -> None:
        nonlocal looks
        looks += 1
        if looks == 15:
            client.set_flow_run_state(run.id, Completed(message="at last"), force=True)

    began = time.monotonic()
    (state,) = await_ends([run], deployment, "quantize", look=look)
    assert state.message == "at last"
    assert time.monotonic() - began > 1.0  # longer than runs wait where none is at work
    assert client.read_flow_run(run.id).name == "quantize"

    client.set_flow_run_state(other.id, Completed(), force=True)
    left = begin(deployment)
    with pytest.raises(StageError, match=f"no worker took a run of {deployment}.*--pool {pool}"):
        list(await_ends([left], deployment, "quantize"))
    cancel_runs([left])
    assert client.read_flow_run(left.id).state_name == "Cancelled"


def answers(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, *states: Any
) -> list[FlowRun]:
    """Have each run that is ordered end in the next of the states; return those ordered."""
    runs: list[FlowRun] = []

    def start(*arguments: Any, **named: Any) -> FlowRun:
        runs.append(start_run(*arguments, **named))
        client.set_flow_run_state(runs[-1].id, states[len(runs) - 1], force=True)
        return runs[-1]

    monkeypatch.setattr(workers, "start_run", start)
    monkeypatch.setattr(workers, "get_run_logger", lambda: logging.getLogger("test"))
    return runs


@pytest.mark.integration
@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([Crashed(message="gone")] * 2, "two runs of it were lost, perhaps because memory ran out"),
        ([Cancelled(message="by hand")], "by hand"),
        ([Crashed(message="gone"), Cancelled()], "its run ended as Cancelled"),
    ],
)
def test_how_a_run_of_a_worker_can_end(
    client: SyncPrefectClient,
    deployment: str,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
    states: list[Any],
    words: str,
) -> None:
    runs = answers(client, monkeypatch, *states)
    pool = Workers(Execution(over="workers", deployment=deployment), store)
    with pytest.raises(StageError, match=words):
        pool.make(ORDER, {}, silent)
    assert len(runs) == len(states)


@pytest.mark.integration
def test_a_worker_with_another_store(
    client: SyncPrefectClient,
    deployment: str,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(client, monkeypatch, Completed(message="made model abc in file:///other"))
    pool = Workers(Execution(over="workers", deployment=deployment), store)
    with pytest.raises(StoreError, match="file:///other, and the store of the flow is file:"):
        pool.make(ORDER, {}, silent)


@pytest.mark.integration
def test_waiting_ends_where_the_flow_does(
    client: SyncPrefectClient,
    deployment: str,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(elsewhere, "UNTAKEN_SECONDS", 60.0)
    runs = answers(client, monkeypatch, Scheduled())
    pool = Workers(Execution(over="workers", deployment=deployment), store)
    settings = copy_context()
    with ThreadPoolExecutor(1) as threads:

        def fail_beside_another() -> "Future[Any]":
            with pool:
                waiting = threads.submit(settings.run, pool.make, ORDER, {}, silent)
                while not runs:
                    time.sleep(0.05)
                raise KeyError(waiting)

        with pytest.raises(KeyError) as failed:
            fail_beside_another()
        (waiting,) = failed.value.args
        with pytest.raises(StageError, match="because the flow ends early"):
            waiting.result(30)
    assert client.read_flow_run(runs[0].id).state_name == "Cancelled"


def test_a_server_that_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0.01)
    asked = 0

    def ask() -> str:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise httpx.ConnectError("refused")
        return "here"

    assert elsewhere._answered(ask) == "here"
    monkeypatch.setattr(elsewhere, "SILENT_SECONDS", 0.05)

    def stay_away() -> str:
        raise httpx.ConnectError("refused")

    with pytest.raises(ServiceUnreachableError, match=r"does not answer \(refused\); start it"):
        elsewhere._answered(stay_away)
