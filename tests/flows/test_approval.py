"""Someone is asked before the alias moves: in Prefect, by its API, and at a terminal."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.registry import Candidate, register_base
from tasks.tracking import connect
from tests.flows.house import OVER, RECIPE, RUN_SECONDS, House, small_recipe
from tests.flows.terminal import Terminal, assert_done, assert_refused

STAGES = [
    "import teacher",
    "prepare data",
    "evaluate teacher",
    "prepare data law",
    "train adapter law",
    "evaluate teacher on law",
    "evaluate teacher + law on law",
]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.service,
    pytest.mark.filterwarnings("ignore:The ``noload``"),  # SQLAlchemy, through MLflow
]


@dataclass
class Asked:
    """A flow run that is suspended, and what MLflow says of what it registered."""

    house: House
    run: str
    client: Any

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.house.ask("GET", f"/flow_runs/{self.run}")["state"]
        return found

    def await_suspension(self, after: str = "") -> dict[str, Any]:
        deadline = time.monotonic() + RUN_SECONDS
        while True:
            state = self.state()
            if state["name"] == "Suspended" and state["id"] != after:
                return state
            assert state["type"] not in OVER, f"{state}\n{self.house.log('worker')}"
            assert time.monotonic() < deadline, f"{state}\n{self.house.log('worker')}"
            time.sleep(0.5)

    def answer(self, **form: object) -> dict[str, Any]:
        path = f"/flow_runs/{self.run}/resume"
        found: dict[str, Any] = self.house.ask("POST", path, {"run_input": form})
        return found

    def form(self, state: dict[str, Any], part: str) -> Any:
        key = state["state_details"]["run_input_keyset"][part]
        return self.house.ask("GET", f"/flow_runs/{self.run}/input/{key}")

    def processes(self) -> list[int]:
        """Return the processes that work for the flow run."""
        seen = psutil.process_iter(["environ"])
        return [
            each.pid
            for each in seen
            if (each.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == self.run
        ]

    def last_event(self) -> str:
        """Return the last event by which the automation that misses heartbeats knows the run."""
        run = {"id": [f"prefect.flow-run.{self.run}"]}
        tag = {"role": ["tag"], "id": ["prefect.tag.stillroom"]}
        wanted = {"event": {"prefix": ["prefect.flow-run."]}, "resource": run, "related": tag}
        body = {"filter": wanted | {"order": "DESC"}, "limit": 1}
        deadline = time.monotonic() + 20
        while True:  # the server writes events down in batches
            found: str = self.house.ask("POST", "/events/filter", body)["events"][0]["event"]
            if found.endswith("-suspended") or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def tags(self, name: str, version: str = "1") -> dict[str, str]:
        found: dict[str, str] = self.client.get_model_version(name, version).tags
        return found

    def parent(self) -> Any:
        """Return the one MLflow run that stands for the flow run."""
        experiment = self.client.get_experiment_by_name("tiny").experiment_id
        mine = f"tags.`stillroom.flow_run_id` = '{self.run}' and tags.`stillroom.run` = 'parent'"
        (found,) = self.client.search_runs([experiment], mine)
        return found

    def states(self, since: str) -> dict[str, str]:
        """Return the name of the state of each task run that began since a moment."""
        of_run = {"flow_runs": {"id": {"any_": [self.run]}}, "limit": 200}
        return {
            run["name"]: run["state_name"]
            for run in self.house.ask("POST", "/task_runs/filter", of_run)
            if run["start_time"] > since
        }


def order_small(house: House, parts: Path, name: str, **publish: object) -> Asked:
    """Order a recipe of few stages, which are there from the second time on."""
    recipe = small_recipe(RECIPE, parts)
    del recipe["distillation"], recipe["quantization"]
    recipe["publish"] = {"name": name, "approval": True, **publish}
    answer = house.order(recipe)
    assert answer.status_code == 201, answer.text
    return Asked(house, answer.json()["id"], connect(house.mlflow))


@pytest.fixture
def order(house: House, parts: Path, mlflow_environment: None) -> Callable[..., Asked]:
    return partial(order_small, house, parts)


def alias(client: Any, name: str) -> str:
    return str(client.get_registered_model(name).aliases.get("champion", ""))


def test_approved_by_api(order: Callable[..., Asked]) -> None:
    asked = order("wanted")
    state = asked.await_suspension()
    deadline = time.monotonic() + 20
    while asked.processes():
        assert time.monotonic() < deadline, "a process is held while the run waits"
        time.sleep(0.2)
    left = asked.house.terminal.home / "store" / "leases" / f"left-{asked.run}.json"
    assert left.exists()  # clean-ups spare what the run will look for
    assert asked.last_event() == "prefect.flow-run.stillroom-suspended"
    waiting = asked.parent()
    assert waiting.info.status == "SCHEDULED"
    assert waiting.data.tags["stillroom.state"] == "suspended"
    assert alias(asked.client, "wanted") == alias(asked.client, "wanted-law") == ""
    assert asked.tags("wanted")["stillroom.approval"] == "pending"
    assert asked.tags("wanted")["stillroom.compared_with"] == "none"
    description = asked.form(state, "description")
    assert "Shall @champion move to models:/wanted/1" in description
    assert "| teacher | base |" in description
    assert set(asked.form(state, "schema")["properties"]) == {"approve", "comment"}

    assert asked.answer()["status"] == "REJECT"  # an empty form approves nothing
    assert asked.answer(approve=True, comment="small enough")["status"] == "ACCEPT"
    ended = asked.house.await_end(asked.run)

    assert ended["state"]["name"] == "Completed", ended["state"]
    assert "small enough" in ended["state"]["message"]
    assert asked.states(since=state["timestamp"]) == {
        **dict.fromkeys(STAGES, "Cached"),
        **dict.fromkeys(["check gates", "register", "approve", "write report"], "Completed"),
    }
    for name in ("wanted", "wanted-law"):
        assert alias(asked.client, name) == "1"
        tags = asked.tags(name)
        assert tags["stillroom.approval"] == "approved"
        assert tags["stillroom.approval_comment"] == "small enough"
        assert asked.run in tags["stillroom.approval_by"]
        assert tags["stillroom.approval_time"] >= state["timestamp"][:19]
    parent = asked.parent()
    assert parent.info.run_id == waiting.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["stillroom.approval"] == "approved"
    assert "stillroom.state" not in parent.data.tags
    assert not left.exists()

    nothing_to_ask = order("wanted")
    assert nothing_to_ask.house.await_end(nothing_to_ask.run)["state"]["name"] == "Completed"


def test_refused_by_api_and_approved_after_all(order: Callable[..., Asked]) -> None:
    asked = order("unwanted")
    asked.await_suspension()
    asked.answer(approve=False, comment="too dear")
    ended = asked.house.await_end(asked.run)
    assert (ended["state"]["type"], ended["state"]["name"]) == ("FAILED", "Refused")
    assert "too dear" in ended["state"]["message"]
    assert alias(asked.client, "unwanted") == alias(asked.client, "unwanted-law") == ""
    assert asked.tags("unwanted-law")["stillroom.approval"] == "refused"
    assert asked.parent().data.tags["stillroom.approval_comment"] == "too dear"
    assert asked.parent().info.status == "FINISHED"

    again = order("unwanted")  # the same versions, the same champion: nobody is asked again
    ended = again.house.await_end(again.run)
    assert ended["state"]["name"] == "Refused"
    assert "too dear" in ended["state"]["message"]

    done = asked.house.terminal.type("approve", "models:/unwanted/1", "--comment", "cheaper now")
    assert done.returncode == 0, done.stderr
    assert alias(asked.client, "unwanted") == alias(asked.client, "unwanted-law") == "1"
    assert asked.tags("unwanted")["stillroom.approval_comment"] == "cheaper now"
    assert again.parent().data.tags["stillroom.approval"] == "approved"


def test_champion_that_comes_meanwhile_makes_it_another_question(
    order: Callable[..., Asked], parts: Path
) -> None:
    asked = order("rivalled")
    first = asked.await_suspension()
    run = asked.parent().info.run_id
    other = Candidate("rivalled", parts / "teacher", "causal_lm", "f" * 64, run, "none")
    assert register_base(asked.client, other).version == "2"
    asked.client.set_registered_model_alias("rivalled", "champion", "2")

    asked.answer(approve=True, comment="as it was")
    second = asked.await_suspension(after=first["id"])
    assert alias(asked.client, "rivalled") == "2"
    assert asked.tags("rivalled")["stillroom.compared_with"] == "models:/rivalled/2"
    assert asked.tags("rivalled")["stillroom.approval"] == "pending"
    assert "another champion has come since" in asked.form(second, "description")

    asked.answer(approve=True, comment="as it is")
    assert asked.house.await_end(asked.run)["state"]["name"] == "Completed"
    assert alias(asked.client, "rivalled") == "1"
    assert asked.tags("rivalled")["stillroom.approval_comment"] == "as it is"


def test_nobody_answers_in_time(order: Callable[..., Asked]) -> None:
    asked = order("forgotten", approval_timeout_hours=15 / 3600)
    first = asked.await_suspension()
    ended = asked.house.await_end(asked.run)
    assert ended["state"]["type"] == "FAILED"
    assert "never resumed" in ended["state"]["message"]
    assert asked.answer(approve=True)["status"] != "ACCEPT"
    assert alias(asked.client, "forgotten") == ""
    assert asked.tags("forgotten")["stillroom.approval"] == "pending"
    waits_until = asked.parent().data.tags["stillroom.waits_until"]
    assert waits_until[:16] >= first["timestamp"][:16]

    # Run again, it asks again.
    retried = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    asked.house.ask("POST", f"/flow_runs/{asked.run}/set_state", {"state": retried})
    second = asked.await_suspension(after=first["id"])
    assert "models:/forgotten/1" in asked.form(second, "description")

    on = {"type": "SCHEDULED", "name": "Scheduled"}  # not by the form: nobody answered
    asked.house.ask("POST", f"/flow_runs/{asked.run}/set_state", {"state": on})
    ended = asked.house.await_end(asked.run)
    assert ended["state"]["type"] == "FAILED"
    assert "goes on without an answer" in ended["state"]["message"]
    assert asked.parent().info.status == "FAILED"
    assert alias(asked.client, "forgotten") == ""


def test_approved_at_a_terminal(
    terminal: Callable[..., Terminal], parts: Path, mlflow_environment: None
) -> None:
    opened = terminal()
    recipe = small_recipe(RECIPE, parts) | {"publish": {"name": "tiny", "approval": True}}
    del recipe["distillation"], recipe["quantization"], recipe["adapters"]
    opened.write(recipe)
    done = opened.compress()
    assert_done(done)
    assert "approve it: python -m flows approve models:/tiny/1" in done.stdout
    assert "@champion waits for an approval" in done.stdout
    client = connect(f"sqlite:///{opened.home / 'mlflow.db'}")
    assert alias(client, "tiny") == ""

    shown = opened.type("approve", "models:/tiny/1", "--show")
    assert shown.returncode == 0, shown.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("teacher ")]
    assert row in shown.stdout
    assert client.get_model_version("tiny", "1").tags["stillroom.approval"] == "pending"
    assert_refused(opened.type("approve", "models:/tiny/7"), "models:/tiny/7", "no such")

    refused = opened.type("approve", "models:/tiny/1", "--refuse", "--comment", "not yet")
    assert "stays where it is" in refused.stdout, refused.stderr
    assert alias(client, "tiny") == ""
    again = opened.compress()
    assert again.returncode == 1, again.stdout + again.stderr
    assert "not yet" in again.stdout

    approved = opened.type("approve", "models:/tiny/1")
    assert "@champion moved" in approved.stdout, approved.stderr
    assert alias(client, "tiny") == "1"
    assert_refused(opened.type("approve", "models:/tiny/1"), "already", "approved by")
    last = opened.compress()
    assert_done(last)
    assert "approve it" not in last.stdout
