"""What is said of the progress of long work."""

import logging

import pytest

from tasks import progress
from tasks.progress import ShownProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number; no artifact is sent."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("STILLROOM_PROGRESS_SECONDS", "inf")
    return now


def test_waiting_and_what_was_done_before_are_no_speed(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ShownProgress("cache teacher", logging.getLogger("test")) as shown:
        clock[0] += 3600  # for a worker
        shown(50, 100, "rows")
        clock[0] += 40
        shown(70, 100, "rows")
    assert caplog.messages == [
        "cache teacher: 50 of 100 rows",
        "cache teacher: 70 of 100 rows, about 60 s left",
    ]
