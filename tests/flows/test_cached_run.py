"""What it costs to find that there is nothing to do."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.flows.house import STAGES, House
from tests.flows.terminal import ROOT, assert_done

LIMIT_SECONDS = 5.0
HEAVY = ("torch", "transformers", "peft", "matplotlib", "datasets")


def test_flow_is_imported_without_what_only_stages_need() -> None:
    ask = f"import flows.compress, sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


@pytest.mark.alone
@pytest.mark.integration
def test_cached_run_costs_little_more_than_its_plan(
    house: House, ordered: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def compress() -> None:
        assert_done(house.terminal.compress(), tuple(STAGES))

    def plan() -> None:
        done = house.terminal.compress("--plan")
        assert f"0 of {len(STAGES)} stages to do" in done.stdout, done.stdout + done.stderr

    compress()  # the report's task and the files it reads are warm, as on a server in use
    pairs = [(timed(plan), timed(compress)) for _ in range(5)]
    planned, run = (statistics.median(times) for times in zip(*pairs, strict=True))
    with capsys.disabled():
        print(f"\n--plan {planned:.2f} s, cached run of {len(STAGES)} stages {run:.2f} s")
    assert run - planned <= LIMIT_SECONDS
