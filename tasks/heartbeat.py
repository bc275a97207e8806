"""Signs of life of a flow run: without them the automation stillroom-lost-runs calls it lost."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.events.related import tags_as_related_resources
from prefect.exceptions import Pause

BEAT_SECONDS = 30.0
"""The automation waits for three beats: deployments/automations.yaml."""
BEAT = "prefect.flow-run.heartbeat"
"""Prefect's own name of it, by which everybody's automations know it."""
SUSPENDED = "prefect.flow-run.stillroom-suspended"


@contextmanager
def beating() -> Iterator[None]:
    """Give a sign of life now, and every 30 s until the flow's work is over.

    Prefect's own comes every 180 s unless each process is told otherwise, and has every run wait
    for up to a second at its end.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            _say(BEAT)

    heart = threading.Thread(target=copy_context().run, args=(beat,), name="heart", daemon=True)
    _say(BEAT)
    heart.start()
    try:
        yield
    except Pause:
        over.set()
        heart.join()
        # A beat after the state Suspended would be missed after 90 s, and the waiting run be
        # called Crashed: a later event ends that watch.
        _say(SUSPENDED)
        raise
    finally:
        over.set()
        heart.join()


def _say(event: str) -> None:
    context = FlowRunContext.get()
    assert context is not None
    run = context.flow_run
    assert run is not None
    emit_event(
        event,
        resource={"prefect.resource.id": f"prefect.flow-run.{run.id}"},
        related=tags_as_related_resources(set(run.tags)),
    )
