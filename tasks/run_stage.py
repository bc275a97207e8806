"""The Prefect task that every stage is: find the artifact in the store, or have it made."""

from collections.abc import Mapping

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks.child import Request
from tasks.explain import explain
from tasks.journal import Journal
from tasks.progress import ShownProgress
from tasks.run_child import run_child
from tasks.settings import Settings
from tasks.stages import Order
from tasks.store.record import Record
from tasks.store.store import open_store
from tasks.workers import Workers


# The store is the only cache: two would disagree after a clean-up.
@task(name="stage", task_run_name="{order.title}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    order: Order,
    records: Mapping[str, Record],
    threads: int,
    journal: Journal,
    workers: Workers,
) -> "State[Record]":
    """Return the record of the order's artifact; the state is named Cached where it was there.

    It is made in a process of this machine, or where `workers` take it.

    An error that the user can act on becomes a Failed state with its sentence, not a traceback.
    """
    journal.begin_stage(order)
    try:
        record = open_store(Settings().store_url).find(order.kind, order.key)
        cached = record is not None
        if record is None:
            journal.log_cached()  # before what may take hours
            record = _make(order, records, threads, workers)
        journal.log_stage(order, record, cached=cached)
    except Exception as error:
        explained = explain(error, order.title)
        if explained is None:
            raise
        journal.log_failure(order, explained)
        return Failed(message=str(explained), data=explained)
    if cached:
        return Completed(name="Cached", message=f"{order.kind} {order.key[:12]}", data=record)
    _show(order, record)
    return Completed(message=f"made {order.kind} {order.key[:12]}", data=record)


def _make(order: Order, records: Mapping[str, Record], threads: int, workers: Workers) -> Record:
    settings = Settings()
    request = Request(
        order=order, records=dict(records), store_url=settings.store_url, threads=threads
    )
    with ShownProgress(order.title, get_run_logger()) as progress:
        if workers.take(order):
            return workers.make(order, records, progress)
        return run_child(request, settings.scratch_root, progress)


def _show(order: Order, record: Record) -> None:
    """Leave a table with what came of the stage in Prefect's UI."""
    facts = {"artifact": f"{record.kind}/{record.key}", "size_bytes": record.size_bytes}
    rows = [{"figure": name, "value": value} for name, value in (facts | record.metrics).items()]
    create_table_artifact(
        table=rows, key=order.stage.name.replace("_", "-"), description=order.title
    )
