"""Prefect's server, whose event loop frees no garbage."""

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.settings import Settings
from tests.flows.terminal import ROOT

WATCH = """
import asyncio, gc, sys, threading, time, weakref
import prefect.cli, uvicorn
from tasks.servers import prefect_server

prefect_server.COLLECT_SECONDS = 0.2
freed_by = []

class Cycle:
    def __init__(self):
        self.own = self

def app():
    cycle = Cycle()
    watch = weakref.ref(cycle, lambda _: freed_by.append(threading.current_thread().name))
    del cycle
    while not freed_by:
        time.sleep(0.05)
    print(freed_by, gc.isenabled(), sys.argv)

"""
COMMAND = """
prefect.cli.app = app
prefect_server.main()
"""
# As `uvicorn` does with the variable by which it is told.
LOOP = """
async def serve():
    app()

with asyncio.Runner(loop_factory=uvicorn.Config("app", loop=sys.argv[1]).get_loop_factory()) as it:
    it.run(serve())
"""


def freed(script: str, *arguments: str) -> str:
    """Return which thread freed the garbage that a server left, and what it was called with."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH + script, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_garbage_is_freed_by_a_thread_of_its_own() -> None:
    assert freed(COMMAND, "server", "start") == "['garbage'] False ['prefect', 'server', 'start']"


def test_so_does_the_server_of_a_run_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("UVICORN_LOOP", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path))
    loop = Settings().environment()["UVICORN_LOOP"]
    assert freed(LOOP, loop) == f"['garbage'] False ['-c', '{loop}']"
