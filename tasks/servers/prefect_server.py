"""Prefect's server, which collects its garbage beside its event loop: `prefect server start`.

In garbage lie cursors of SQLite's connections, and to free one waits for what its connection is
about. Where that is itself the wait for the lock of a transaction which the event loop is to end,
and the loop frees the cursor, the server stands still for a minute, until SQLite gives up: seen
with Prefect 3.8 and CPython 3.11, once in a few dozen runs. A thread holds up nobody.
"""

import gc
import sys
import threading
import time

COLLECT_SECONDS = 20.0


def main() -> None:
    """Do what the command line asks of Prefect."""
    from prefect.cli import app

    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()
    sys.argv[0] = "prefect"
    app()


def _collect() -> None:
    time.sleep(COLLECT_SECONDS)
    gc.collect()
    gc.freeze()  # what has been imported stays
    while True:
        time.sleep(COLLECT_SECONDS)
        gc.collect()


if __name__ == "__main__":
    main()
