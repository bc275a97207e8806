"""What the automations do on a real server: end a lost run, and say how runs end."""

import json
import os
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from tasks.servers.automations import AUTOMATIONS, NOTIFICATIONS, listed
from tests.flows.house import House, open_house, small_recipe, start
from tests.flows.terminal import ROOT

TRUTH_SECONDS = 120
ALIVE_SECONDS = 100
"""Longer than the automation waits for a sign of life."""
START_SECONDS = 90
NOTICE_SECONDS = 30

BLOCKS = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
CustomWebhookNotificationBlock(
    name="anything", url=sys.argv[1], json_data={"text": "{{subject}}\\n{{body}}"}
).save("stillroom-webhook")
SlackWebhook(url=sys.argv[2]).save("stillroom-mail")
"""


def test_every_automation_is_one() -> None:
    from prefect.events.schemas.automations import AutomationCore
    from prefect.server.events.schemas.automations import AutomationCreate

    for automation in listed(AUTOMATIONS):
        AutomationCreate.model_validate(automation)
        # What `prefect automation create --from-file` takes.
        AutomationCore.model_validate(automation)
    for automation in listed(NOTIFICATIONS):
        (action,) = automation["actions"]
        action["block_document_id"] = "00000000-0000-0000-0000-000000000000"
        AutomationCreate.model_validate(automation)


def test_they_watch_our_runs_alone() -> None:
    from prefect.server.events.schemas.automations import AutomationCreate

    assert all("stillroom" in each["tags"] for each in _deployments())
    for automation in listed(AUTOMATIONS):
        trigger = AutomationCreate.model_validate(automation).trigger
        assert cast(Any, trigger).match_related.root == {
            "prefect.resource.role": "tag",
            "prefect.resource.id": "prefect.tag.stillroom",
        }


@pytest.mark.integration
@pytest.mark.service
@pytest.mark.timeout(500)
def test_a_run_that_lost_its_process_and_its_worker_becomes_crashed(
    tmp_path: Path, recipe: dict[str, Any], parts: Path
) -> None:
    terminal = open_house(tmp_path)
    terminal.variables["STILLROOM_DATA_ROOTS"] = str(parts)
    try:
        house = start(terminal)
        with _webhook() as (webhook, said), _post_office() as (address, mails):
            house.python("-c", BLOCKS, webhook, address)
            assert _names(house) == ["stillroom-lost-runs", "stillroom-unstarted-runs"]
            assert "are there" in house.python("-m", "tasks.servers.set_up")
            ours = ["lost-runs", "mail", "unstarted-runs", "webhook"]
            assert _names(house) == [f"stillroom-{name}" for name in ours]

            long = small_recipe(recipe, parts)
            long["distillation"]["training"] = {"steps": 10**6, "checkpoint_every_steps": 10**5}
            with _typed(house, long) as typed:
                runs = [_ordered(house, long), typed]
                time.sleep(ALIVE_SECONDS)
                assert [_state(house, run)["name"] for run in runs] == ["Running", "Running"]
                killed = _kill_worker_and_flow(house)
            for run in runs:
                state = _await_state(house, run, killed)
                assert state["name"] == "Crashed"
                assert "No heartbeat" in state["message"]

            _until(lambda: len(said) == len(mails) == 2, NOTICE_SECONDS)
        assert all("tiny is Crashed" in each["text"] for each in said)
        assert all("No heartbeat for 90 s" in each["text"] for each in said)
        assert all(any(f"/runs/flow-run/{run}" in each["text"] for each in said) for run in runs)
        assert all("Subject: Stillroom: tiny is Crashed" in mail for mail in mails)
    finally:
        assert terminal.type("down").returncode == 0


def _deployments() -> list[dict[str, Any]]:
    import yaml

    file = ROOT / "deployments" / "prefect.yaml"
    deployments: list[dict[str, Any]] = yaml.safe_load(file.read_text())["deployments"]
    return deployments


def _ordered(house: House, recipe: dict[str, Any]) -> str:
    """Return the id of a run of the worker's that has begun its stages."""
    answer = house.order(recipe)
    assert answer.status_code == 201, answer.text
    run: str = answer.json()["id"]
    _until(lambda: bool(house.states(run)), START_SECONDS)
    return run


@contextmanager
def _typed(house: House, recipe: dict[str, Any]) -> Iterator[str]:
    """Yield the id of a run that is typed into a terminal, once it has begun; kill it then."""
    terminal = house.terminal
    terminal.write(recipe | {"seed": 1})
    before = {run["id"] for run in _runs(house)}
    with (terminal.folder / "typed.log").open("wb") as log:
        process = subprocess.Popen(
            terminal.command("compress", "recipe.yaml"),
            cwd=terminal.folder,
            env=terminal.environment(),
            stdout=log,
            stderr=log,
        )
    found: list[str] = []

    def begun() -> bool:
        found[:] = [run["id"] for run in _runs(house) if run["id"] not in before]
        return bool(found) and bool(house.states(found[0]))

    try:
        _until(begun, START_SECONDS)
        yield found[0]
    finally:
        process.kill()
        process.wait()


def _runs(house: House) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = house.ask("POST", "/flow_runs/filter", {})
    return runs


def _kill_worker_and_flow(house: House) -> float:
    pids = json.loads((house.terminal.home / "services.json").read_text())["pids"]
    (flow,) = psutil.Process(pids["worker"]).children()
    os.kill(pids["worker"], signal.SIGKILL)
    flow.kill()
    return time.monotonic()


def _state(house: House, run: str) -> dict[str, Any]:
    state: dict[str, Any] = house.ask("GET", f"/flow_runs/{run}")["state"]
    return state


def _await_state(house: House, run: str, killed: float) -> dict[str, Any]:
    while True:
        state = _state(house, run)
        took = time.monotonic() - killed
        if state["type"] != "RUNNING":
            print(f"\n{state['name']} {took:.0f} s after the kill")
            return state
        assert took < TRUTH_SECONDS, state
        time.sleep(0.5)


def _names(house: House) -> list[str]:
    return sorted(each["name"] for each in house.ask("POST", "/automations/filter", {}))


def _until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@contextmanager
def _webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Lend an address, and what is posted there."""
    said: list[dict[str, Any]] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with _served(ThreadingHTTPServer(("127.0.0.1", 0), Listener)) as port:
        yield f"http://127.0.0.1:{port}/", said


@contextmanager
def _post_office() -> Iterator[tuple[str, list[str]]]:
    """Lend the address of a mail server as Apprise writes it, and the mails that it gets."""
    mails: list[str] = []

    class Clerk(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._say("220 here")
            while line := self.rfile.readline().decode().strip():
                if line.upper() == "DATA":
                    self._say("354 go on")
                    lines = iter(lambda: self.rfile.readline().decode().rstrip(), ".")
                    mails.append("\n".join(lines))
                self._say("221 bye" if line.upper() == "QUIT" else "250 well")

        def _say(self, answer: str) -> None:
            self.wfile.write(f"{answer}\r\n".encode())

    with _served(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Clerk)) as port:
        yield f"mailto://127.0.0.1:{port}?from=still@room.test&to=cook@room.test", mails


@contextmanager
def _served(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield cast(int, server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
