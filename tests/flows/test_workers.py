"""`execution.over: workers`: stages made in the GPU pool, interrupted there, and gone on with."""

import copy
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.flows.house import House, small_recipe
from tests.flows.terminal import Terminal, assert_refused

pytestmark = pytest.mark.integration
WAIT_SECONDS, CANCEL_SECONDS = 120, 10
STUDENT = "distil student"
HERE = {"import teacher", "prepare data"}
ELSEWHERE = {"cache teacher", STUDENT, "evaluate teacher", "evaluate student"}


def long_recipe(recipe: dict[str, Any], parts: Path) -> dict[str, Any]:
    """Return a recipe for a student that takes long enough to be interrupted."""
    small = small_recipe(recipe, parts)
    for section in ("quantization", "adapters", "publish"):
        small.pop(section, None)
    small["distillation"]["training"] = {
        "steps": 800,
        "batch_rows": 2,
        "checkpoint_every_steps": 40,
        "evaluate_every_steps": 400,
    }
    small["execution"] = {"threads": 1, "over": "workers"}
    return small | {"name": "sent", "seed": 81}


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

    def await_work(self, title: str, after: int = 0) -> tuple[str, list[str]]:
        """Wait until a stage is at work and has a checkpoint; return its run and checkpoints.

        `after` is the number of its runs that there were before.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            runs, kept = self.runs(title), self.checkpoints()
            if len(runs) > after and kept:
                run: str = runs[0]["id"]
                if any("tasks.child" in each for each in self.processes(run).values()):
                    return run, kept
            assert time.monotonic() < deadline, self.house.log("gpu-worker-0")
            time.sleep(0.1)

    def checkpoints(self) -> list[str]:
        partial = self.house.terminal.home / "store" / "partial"
        return sorted(file.stem for file in partial.glob("*/*.json"))

    def kill(self, run: str, module: str) -> None:
        """Kill a process of a run as the kernel does when memory has run out."""
        (victim,) = [pid for pid, each in self.processes(run).items() if module in each]
        os.kill(victim, signal.SIGKILL)


def order(house: House, recipe: dict[str, Any]) -> str:
    answer = house.order(recipe)
    assert answer.status_code == 201, answer.text
    run: str = answer.json()["id"]
    return run


def cancel(house: House, run: str) -> None:
    """Cancel a run, as the button in the UI does."""
    state = {"type": "CANCELLING", "name": "Cancelling"}
    house.ask("POST", f"/flow_runs/{run}/set_state", {"state": state})


def test_interrupted_stages_go_on_in_the_gpu_pool(
    house: House, recipe: dict[str, Any], parts: Path
) -> None:
    pool, asked = Pool(house), long_recipe(recipe, parts)

    # Cancelled: what works for it is gone, and its checkpoints are not.
    run = order(house, asked)
    sent, kept = pool.await_work(STUDENT)
    both = [*pool.processes(run), *pool.processes(sent)]
    assert len(both) >= 3
    began = time.monotonic()
    cancel(house, run)
    while any(map(psutil.pid_exists, both)):
        assert time.monotonic() - began < CANCEL_SECONDS, pool.processes(sent)
        time.sleep(0.1)
    assert house.await_end(run)["state"]["type"] == "CANCELLED"
    assert house.await_end(sent)["state"]["type"] == "CANCELLED"
    after_cancel = pool.checkpoints()
    assert after_cancel >= kept

    # Killed for its memory: an error of that stage, in both runs.
    run = order(house, asked)
    sent, kept = pool.await_work(STUDENT, after=1)
    assert kept >= after_cancel  # nothing was begun anew
    pool.kill(sent, "tasks.child")
    for ended in (house.await_end(sent), house.await_end(run)):
        assert ended["state"]["name"] == "Failed"
        assert "distil student was killed by the operating system" in ended["state"]["message"]
        assert "memory ran out" in ended["state"]["message"]
    after_kill = pool.checkpoints()

    # Lost with its run, and ordered by two at once: one artifact.
    twins = [order(house, asked), order(house, asked)]
    sent, kept = pool.await_work(STUDENT, after=2)
    assert kept >= after_kill
    pool.kill(sent, "prefect.engine")
    for twin in twins:
        assert house.await_end(twin)["state"]["name"] == "Completed", house.log("gpu-worker-0")
    assert house.await_end(sent)["state"]["type"] == "CRASHED"
    assert pool.checkpoints() == []
    students = [r for r in house.terminal.records("model") if "soft_weight" in r.section]
    assert len([r for r in students if r.section["training"]["steps"] == 800]) == 1
    _assert_made_in_the_pool(house, pool, twins)


def _assert_made_in_the_pool(house: House, pool: Pool, twins: list[str]) -> None:
    for title in ELSEWHERE:
        for run in pool.runs(title):
            assert run["work_pool_name"] == "stillroom-gpu"
            parent = house.ask("GET", f"/task_runs/{run['parent_task_run_id']}")["flow_run_id"]
            assert run["state"]["type"] != "COMPLETED" or parent in (*twins, *_cancelled(house))
    for title in HERE:
        assert pool.runs(title) == []
    named = [r.section["hardware"] for r in house.terminal.records("evaluation")]
    assert named.count("workers of make-stage/make-stage, 1 threads") == 2


def _cancelled(house: House) -> list[str]:
    """Return the runs that were cancelled: they had their teacher's cache made before."""
    of_state = {"flow_runs": {"state": {"type": {"any_": ["CANCELLED"]}}}}
    return [run["id"] for run in house.ask("POST", "/flow_runs/filter", of_state)]


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
