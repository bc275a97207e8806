"""Prefect's server, whose event loop frees no garbage."""

import subprocess
import sys

from tests.flows.terminal import ROOT

STAND_IN = """
import gc, sys, threading, time, weakref
import prefect.cli
from tasks.servers import prefect_server

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

prefect.cli.app = app
prefect_server.COLLECT_SECONDS = 0.2
prefect_server.main()
"""


def test_garbage_is_freed_by_a_thread_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, "server", "start"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['garbage'] False ['prefect', 'server', 'start']"
