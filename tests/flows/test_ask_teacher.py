"""The teacher asked on other machines: runs of a deployment on a work pool, and tasks on Ray."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import ask_teacher
from stillroom.errors import StageError
from tasks import elsewhere
from tasks.cache_share import Share
from tasks.stages import CACHE_TEACHER, Order
from tasks.store.record import Record
from tests.flows.house import House, small_recipe
from tests.flows.terminal import Terminal, assert_done, assert_refused

CACHE = "cache teacher"


def only_cached(recipe: dict[str, Any], parts: Path, over: str, seed: int) -> dict[str, Any]:
    """Return a recipe that ends with a student, whose cache no other test has made."""
    small = small_recipe(recipe, parts)
    for section in ("quantization", "adapters", "publish"):
        small.pop(section, None)
    small["execution"] = {"threads": 1, "cache_workers": 2, "cache_over": over}
    return small | {"seed": seed}


def newest_cache(user: Terminal) -> Record:
    return max(user.records("teacher-cache"), key=lambda record: record.created)


@pytest.fixture
def one_at_a_time(house: House) -> Iterator[None]:
    """Have a single run go on at once: one that waits for its shares must not keep them out."""
    queue = "/work_pools/stillroom-cpu/queues/default"
    before = house.ask("GET", queue)["concurrency_limit"]
    house.ask("PATCH", queue, {"concurrency_limit": 1})
    yield
    house.ask("PATCH", queue, {"concurrency_limit": before})


@pytest.mark.integration
@pytest.mark.usefixtures("one_at_a_time")
def test_a_work_pool_asks_the_teacher(house: House, recipe: dict[str, Any], parts: Path) -> None:
    answer = house.order(only_cached(recipe, parts, "prefect", seed=71))
    assert answer.status_code == 201, answer.text
    run = house.await_end(answer.json()["id"])
    assert run["state"]["name"] == "Completed", f"{run['state']}\n{house.log('worker')}"
    named = {"flow_runs": {"name": {"any_": [f"{CACHE}, shared"]}}}
    shares = house.ask("POST", "/flow_runs/filter", named)
    assert [share["state_name"] for share in shares] == ["Completed", "Completed"]
    shared = newest_cache(house.terminal)
    # One process alone makes the same bytes.
    house.terminal.forget(shared)
    alone = only_cached(recipe, parts, "processes", seed=71)
    alone["execution"]["cache_workers"] = 1
    run = house.await_end(house.order(alone).json()["id"])
    assert run["state"]["name"] == "Completed", run["state"]
    assert newest_cache(house.terminal).files == shared.files


def test_a_deployment_that_is_not_there(
    terminal: Callable[..., Terminal], recipe: dict[str, Any], parts: Path
) -> None:
    user = terminal()
    user.write(only_cached(recipe, parts, "prefect", seed=72))
    assert_refused(user.compress(), "has no deployment ask-teacher/ask-teacher", "processes")


def test_runs_that_no_worker_takes(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "UNTAKEN_SECONDS", 1.0)
    monkeypatch.setattr(elsewhere, "POLL_SECONDS", 0.2)
    order = Order(title=CACHE, stage=CACHE_TEACHER, section={}, seed=0)
    share = Share(order=order, records={}, run="one", threads=1)
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="deserted", type="process"))
        ask_teacher.ask_teacher.from_source(
            source=str(Path(__file__).parents[2]), entrypoint="flows/ask_teacher.py:ask_teacher"
        ).deploy("nobody", work_pool_name="deserted", print_next_steps=False)
        with pytest.raises(StageError, match="no worker took a run of ask-teacher/nobody"):
            ask_teacher._over_prefect(share, 2, "ask-teacher/nobody")
        named = DeploymentFilter(name=DeploymentFilterName(any_=["nobody"]))
        runs = client.read_flow_runs(deployment_filter=named)
    assert [run.state_name for run in runs] == ["Cancelled", "Cancelled"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("prefect_ray") is None, reason="prefect-ray is not installed")
def test_ray_asks_the_teacher(
    terminal: Callable[..., Terminal], recipe: dict[str, Any], parts: Path
) -> None:
    user = terminal()
    user.write(only_cached(recipe, parts, "ray", seed=73))
    assert_done(user.compress())
    shared = newest_cache(user)
    user.forget(shared)
    alone = only_cached(recipe, parts, "processes", seed=73)
    alone["execution"]["cache_workers"] = 1
    user.write(alone)
    assert_done(user.compress())
    assert newest_cache(user).files == shared.files
