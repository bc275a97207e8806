"""Whoever is killed in the middle of whatever: nothing is lost, and the same order completes it.

`make chaos` kills each victim in each stage, and writes the table.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tasks.store.store import ArtifactStore, open_store
from tests.flows.chaos.table import Case, Row
from tests.flows.chaos.victims import VICTIMS, Rooms
from tests.flows.house import OVER
from tests.servers import S3Server, rgw_is_installed

# The titles of the tasks, in the order in which they run.
STAGES = {
    "teacher cache": "cache teacher",
    "distillation": "distil student",
    "quantization": "quantize",
    "upload": "register",
}
# `make test-team` and `make test-service` have one case for each victim.
SHORT = {
    Case("flow process", "distillation"),
    Case("worker", "quantization"),
    Case("flow process and worker", "teacher cache"),
    Case("Prefect server", "distillation"),
    Case("MLflow server", "upload"),
    Case("S3 server", "teacher cache"),
}
GONE_SECONDS = 10.0
TRUE_SECONDS = 120.0
WAIT_SECONDS = 240.0

pytestmark = [
    pytest.mark.integration,
    pytest.mark.chaos,
    pytest.mark.skipif(not rgw_is_installed(), reason="Ceph's radosgw is not installed"),
]
CASES = [
    pytest.param(
        case,
        id=f"{case.victim}, {case.stage}".replace(" ", "-"),
        marks=[pytest.mark.service] if case in SHORT else [],
    )
    for case in (Case(victim, stage) for victim in VICTIMS for stage in STAGES)
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost(
    case: Case,
    rooms: Rooms,
    whole_recipe: dict[str, Any],
    table: list[Row],
    killable_s3: tuple[S3Server, Any],
    s3_environment: Callable[[S3Server], None],
) -> None:
    s3_environment(killable_s3[0])
    number = [each.values[0] for each in CASES].index(case)
    name = f"chaos-{number}"
    recipe = whole_recipe | {"name": name, "publish": {"name": name}, "seed": 1000 + number}
    house, store = rooms.house, open_store(rooms.house.terminal.variables["STILLROOM_STORE"])
    run = house.ordered(recipe)
    before = {record.key for record in store.records()}
    await_the_middle(rooms, run, STAGES[case.stage], store)
    finished = [record for record in store.records() if record.key not in before]
    dead = rooms.kill(case.victim, run)
    if dead:
        time.sleep(GONE_SECONDS)
        rooms.bring_back(dead)
    returned = time.monotonic()

    ended = await_end(rooms, run, returned + TRUE_SECONDS)
    seconds = time.monotonic() - returned
    until(lambda: not rooms.lives(run), GONE_SECONDS, "the run is over, and a process of it lives")
    assert list(store.verify()) == []
    if ended["state"]["type"] == "COMPLETED":
        assert champion(rooms, name) == "1"

    again = house.make(recipe)
    assert [store.find(record.kind, record.key) for record in finished] == finished
    states = house.states(again["id"])
    cached = [title for title, state in states.items() if state == "Cached"]
    assert len(cached) >= len(finished), states
    assert list(store.verify()) == []
    assert champion(rooms, name) == "1", "a second version of the same artifact"
    table.append(Row(case, ended["state"]["name"], seconds, len(cached)))


def await_the_middle(rooms: Rooms, run: str, title: str, store: ArtifactStore) -> None:
    """Return when a task runs and, if it is a stage, has left its first checkpoints."""
    until(
        lambda: rooms.house.states(run).get(title) == "Running",
        WAIT_SECONDS,
        f"{title} did not begin",
    )
    if title == "register":
        return
    until(lambda: rooms.works(run), WAIT_SECONDS, f"{title} has no process")
    seen = {entry.name for entry in store.backend.list("partial/")}
    until(
        lambda: bool({entry.name for entry in store.backend.list("partial/")} - seen),
        WAIT_SECONDS,
        f"{title} left no checkpoint",
        pause=0.05,
    )


def await_end(rooms: Rooms, run: str, deadline: float) -> dict[str, Any]:
    """Return the run once it is over; the server may still be starting."""
    while True:
        found: dict[str, Any] = {}
        with contextlib.suppress(httpx.TransportError):
            found = rooms.house.ask("GET", f"/flow_runs/{run}")
        if found and found["state"]["type"] in OVER:
            return found
        assert time.monotonic() < deadline, f"{found.get('state')}\n{rooms.house.log('worker')}"
        time.sleep(0.5)


def champion(rooms: Rooms, name: str) -> str | None:
    """Return the version that bears the alias."""
    found = rooms.house.ask_mlflow("GET", "/registered-models/alias", name=name, alias="champion")
    version: str = found["model_version"]["version"]
    return version


def until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(pause)
