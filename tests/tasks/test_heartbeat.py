"""Signs of life of a flow run, with Prefect's events caught."""

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import Pause
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY

from flows.__main__ import typed
from tasks import heartbeat
from tasks.heartbeat import BEAT, SUSPENDED
from tasks.servers.automations import AUTOMATIONS, listed


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a flow run says, in order; its heart beats a hundred times a second."""
    events: list[str] = []

    def emit(event: str, resource: dict[str, str], related: list[Any]) -> None:
        assert resource == {"prefect.resource.id": "prefect.flow-run.7"}
        assert [dict(each)["prefect.resource.id"] for each in related] == ["prefect.tag.stillroom"]
        events.append(event)

    run = SimpleNamespace(flow_run=SimpleNamespace(id=7, tags=["stillroom"]))
    monkeypatch.setattr(heartbeat, "FlowRunContext", SimpleNamespace(get=lambda: run))
    monkeypatch.setattr(heartbeat, "emit_event", emit)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    return events


def run(said: list[str], error: BaseException | None) -> None:
    """Work for three beats, and end so."""
    with heartbeat.beating():
        assert said == [BEAT]
        deadline = time.monotonic() + 10
        while said.count(BEAT) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [None, ValueError(), KeyboardInterrupt()])
def test_a_run_beats_until_it_is_over(said: list[str], error: BaseException | None) -> None:
    with pytest.raises(type(error)) if error else nullcontext():
        run(said, error)
    over = list(said)
    time.sleep(0.1)
    assert said == over
    assert set(said) == {BEAT}


def test_a_suspended_run_says_so_last(said: list[str]) -> None:
    with pytest.raises(Pause):
        run(said, Pause())
    time.sleep(0.1)
    assert said[-1] == SUSPENDED
    assert said.count(SUSPENDED) == 1


def test_the_automation_waits_for_three_beats() -> None:
    (lost,) = [each for each in listed(AUTOMATIONS) if each["name"] == "stillroom-lost-runs"]
    assert lost["trigger"]["after"] == [BEAT]
    assert lost["trigger"]["within"] == 3 * heartbeat.BEAT_SECONDS


def test_prefect_s_own_beats_hold_no_terminal() -> None:
    with typed():
        assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is None
    assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is not None
