"""Prefect's server, which collects its garbage beside its event loop.

It runs as `prefect server start` does, or as the server that Prefect starts for a run in a
terminal: uvicorn takes its event loop from here (UVICORN_LOOP).

In garbage lie cursors of SQLite's connections, and to free one waits for what its connection is
about. Where that is itself the wait for the lock of a transaction which the event loop is to end,
and the loop frees the cursor, the server stands still for a minute, until SQLite gives up: seen
with Prefect 3.8 and CPython 3.11, once in a few dozen runs. A thread holds up nobody.
"""

import asyncio
import gc
import sys
import threading
import time

COLLECT_SECONDS = 20.0


def main() -> None:
    """Do what the command line asks of Prefect."""
    from prefect.cli import app

    _collect_beside()
    sys.argv[0] = "prefect"
    app()


def new_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that uvicorn is to run, and collect garbage beside it."""
    _collect_beside()
    return asyncio.new_event_loop()


def _collect_beside() -> None:
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    time.sleep(COLLECT_SECONDS)
    gc.collect()
    gc.freeze()  # what has been imported stays
    while True:
        time.sleep(COLLECT_SECONDS)
        gc.collect()


if __name__ == "__main__":
    main()
