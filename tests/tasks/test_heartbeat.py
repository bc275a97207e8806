"""Signs of life of a flow run, with Prefect's events caught."""

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import Pause

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


def test_a_beat_that_is_not_heard_is_not_the_last(
    said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    emit, failures = heartbeat.emit_event, iter([None, OSError("away"), OSError("away")])

    def emit_or_fail(*arguments: Any, **named: Any) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        emit(*arguments, **named)

    monkeypatch.setattr(heartbeat, "emit_event", emit_or_fail)
    run(said, None)
    assert caplog.messages == ["no sign of life was given: away"] * 2


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
