"""`execution.over: workers`: stages made in the GPU pool, interrupted there, and gone on with."""

import copy
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.flows.house import House, small_recipe
from tests.flows.terminal import Terminal, assert_refused
from tests.stage_processes import is_stage

pytestmark = pytest.mark.integration
WAIT_SECONDS, CANCEL_SECONDS = 240, 10
STEPS, STUDENT = 1200, "distil student"
HERE = {"import teacher", "prepare data"}
ELSEWHERE = {"cache teacher", STUDENT, "evaluate teacher", "evaluate student"}


def long_recipe(recipe: dict[str, Any], parts: Path) -> dict[str, Any]:
    """Return a recipe for a student that takes long enough to be interrupted."""
    small = small_recipe(recipe, parts)
    for section in ("quantization", "adapters", "publish"):
        small.pop(section, None)
    small["distillation"]["training"] = {
        "steps": STEPS,
        "batch_rows": 2,
        "checkpoint_every_steps": 20,
        "evaluate_every_steps": STEPS,
    }
    small["execution"] = {"threads": 1, "over": "workers"}
    return small | {"name": "sent", "seed": 87}


class Pool:
    """What goes on in a house's GPU pool."""

    def __init__(self, house: House) -> None:
        self.house = house

    def runs(self, title: str) -> list[dict[str, Any]]:
        """Return the runs of a stage, the newest first."""
        asked = {"flow_runs": {"name": {"any_": [title]}}, "sort": "START_TIME_DESC"}
        found: list[dict[str, Any]] = self.house.ask("POST", "/flow_runs/filter", asked)
        return found

    def processes(self, run: str) -> dict[int, str]:
        """Return the process of a run and those below it."""
        # Of a process that is not ours there is nothing to see: None.
        seen = [process.info for process in psutil.process_iter(["pid", "environ", "cmdline"])]
        return {
            each["pid"]: " ".join(each["cmdline"] or ())
            for each in seen
            if (each["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == run and each["cmdline"]
        }

    def await_work(self, title: str, *, not_in: Sequence[str] = (), beyond: str = "") -> str:
        """Wait until another run of a stage is at work, and has a checkpoint beyond another."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            kept = self.checkpoints()
            assert all(name >= beyond for name in kept), "what was finished was begun anew"
            for run in self.runs(title) if kept and kept[-1] > beyond else ():
                if run["id"] not in not_in and run["state_name"] == "Running":
                    found: str = run["id"]
                    return found
            assert time.monotonic() < deadline, self.house.log("gpu-worker-0")
            time.sleep(0.1)

    def checkpoints(self) -> list[str]:
        """Return the checkpoints of trainings, the newest last."""
        partial = self.house.terminal.home / "store" / "partial"
        return sorted(file.stem for file in partial.glob("*/step-*.json"))

    def order_again(self, run: str) -> str:
        """Order what a run makes once more, as another flow would."""
        first = self.house.ask("GET", f"/flow_runs/{run}")
        path = f"/deployments/{first['deployment_id']}/create_flow_run"
        parameters = {"parameters": first["parameters"], "name": first["name"]}
        again: str = self.house.ask("POST", path, parameters)["id"]
        return again

    def kill_stage(self, run: str) -> None:
        """Kill the stage of a run as the kernel does when memory has run out."""
        (stage,) = [each for each in map(psutil.Process, self.processes(run)) if is_stage(each)]
        stage.kill()

    def kill_flow(self, run: str) -> None:
        """Kill the process that Prefect runs a flow in."""
        (flow,) = [pid for pid, each in self.processes(run).items() if "prefect.engine" in each]
        os.kill(flow, signal.SIGKILL)


def order(house: House, recipe: dict[str, Any]) -> str:
    answer = house.order(recipe)
    assert answer.status_code == 201, answer.text
    run: str = answer.json()["id"]
    return run


def cancel(house: House, run: str) -> None:
    """Cancel a run, as the button in the UI does."""
    state = {"type": "CANCELLING", "name": "Cancelling"}
    house.ask("POST", f"/flow_runs/{run}/set_state", {"state": state})


@pytest.mark.service
@pytest.mark.timeout(900)
def test_interrupted_stages_go_on_in_the_gpu_pool(
    house: House, recipe: dict[str, Any], parts: Path
) -> None:
    pool, asked = Pool(house), long_recipe(recipe, parts)

    # Cancelled: what works for it is gone, and its checkpoints are not.
    run = order(house, asked)
    cancelled = pool.await_work(STUDENT)
    both = [*pool.processes(run), *pool.processes(cancelled)]
    assert len(both) >= 3
    began = time.monotonic()
    cancel(house, run)
    while any(map(psutil.pid_exists, both)):
        assert time.monotonic() - began < CANCEL_SECONDS, pool.processes(cancelled)
        time.sleep(0.1)
    assert house.await_end(run)["state"]["type"] == "CANCELLED"
    assert house.await_end(cancelled)["state"]["type"] == "CANCELLED"

    # Killed for its memory: an error of that stage, in both runs.
    last = pool.checkpoints()[-1]
    run = order(house, asked)
    killed = pool.await_work(STUDENT, not_in=[cancelled], beyond=last)
    pool.kill_stage(killed)
    for ended in (house.await_end(killed), house.await_end(run)):
        assert ended["state"]["name"] == "Failed"
        assert "distil student was killed by the operating system" in ended["state"]["message"]
        assert "memory ran out" in ended["state"]["message"]
    assert house.states(run)[STUDENT] == "Failed"

    # Lost with its process, and ordered by another run too: one artifact.
    last = pool.checkpoints()[-1]
    run = order(house, asked)
    lost = pool.await_work(STUDENT, not_in=[cancelled, killed], beyond=last)
    twin = pool.order_again(lost)
    pool.kill_flow(lost)
    assert house.await_end(lost)["state"]["type"] == "CRASHED"
    assert house.await_end(twin)["state"]["name"] == "Completed"
    assert house.await_end(run)["state"]["name"] == "Completed", house.log("gpu-worker-0")
    assert pool.checkpoints() == []
    records = [each for each in house.terminal.records("model") if "soft_weight" in each.section]
    assert len([each for each in records if each.section["training"]["steps"] == STEPS]) == 1
    made = [each["state"]["message"] for each in pool.runs(STUDENT)]
    assert sum(message.startswith("made ") for message in made) == 1
    assert sum("already" in message for message in made) == 1
    assert_where_each_was_made(house, pool, run)


def assert_where_each_was_made(house: House, pool: Pool, run: str) -> None:
    """Assert that the pool has made what computes with a model, shown below the run."""
    for title in ELSEWHERE:
        assert {each["work_pool_name"] for each in pool.runs(title)} == {"stillroom-gpu"}
    for title in HERE:
        assert pool.runs(title) == []
    assert house.states(run).keys() >= HERE | ELSEWHERE
    newest = pool.runs("evaluate student")[0]
    task = house.ask("GET", f"/task_runs/{newest['parent_task_run_id']}")
    assert task["flow_run_id"] == run
    evaluations = house.terminal.records("evaluation")
    named = [each.section["hardware"] for each in evaluations]
    assert named.count("workers of make-stage/make-stage, 1 threads") == 2


def test_an_order_with_sources_is_refused(house: House) -> None:
    name = "make-stage/make-stage"
    deployment = house.ask("GET", f"/deployments/name/{name}")
    stage = {"name": "import_model", "kind": "model", "version": 1}
    source = {"reference": "/etc/passwd", "place": "local", "identity": "x"}
    asked = {"title": "planted", "stage": stage, "section": {}, "seed": 0}
    asked["sources"] = {"source": source}
    errand = {"order": asked, "key": "a" * 64, "kinds": {}}
    path = f"/deployments/{deployment['id']}/create_flow_run"
    run = house.ask("POST", path, {"parameters": {"errand": errand}})
    state = house.await_end(run["id"])["state"]
    assert state["type"] == "FAILED"
    assert "a worker reads no sources, source came" in state["message"]


def test_workers_without_a_server(
    terminal: Callable[..., Terminal], recipe: dict[str, Any]
) -> None:
    user = terminal()
    del user.variables["PREFECT_API_URL"]
    changed = copy.deepcopy(recipe)
    changed["execution"]["over"] = "workers"
    user.write(changed)
    assert_refused(user.compress(), "execution.over: workers", "make up", "PREFECT_API_URL")


def test_workers_of_a_server_without_the_deployment(
    terminal: Callable[..., Terminal], recipe: dict[str, Any], parts: Path
) -> None:
    user = terminal()
    user.write(long_recipe(recipe, parts))
    assert_refused(user.compress(), "has no deployment make-stage/make-stage", "over: here")
