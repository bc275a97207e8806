"""Ask the teacher on other machines, by runs of a Prefect deployment or by tasks on Ray.

Each worker fetches the teacher and the rows from the store, takes the next piece of the cache that
nobody has claimed, and leaves it in the store: so all must know the store by the same address.
What none of them made, because it was killed, the stage itself makes.
"""

import os
import uuid
from collections.abc import Mapping
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed

from stillroom.config import Recipe
from stillroom.errors import RecipeError, StageError
from tasks.cache_share import Share, work_share
from tasks.elsewhere import await_ends, cancel_runs, start_run
from tasks.explain import concluded
from tasks.progress import ShownProgress
from tasks.quiet_logs import hide_secrets_in_logs
from tasks.stages import CACHE_TEACHER, Order
from tasks.store.record import Record
from tasks.store.store import ArtifactStore

SETTINGS = {
    "setting": "execution.cache_deployment",
    "instead": "execution.cache_over: processes",
}


@flow(name="ask-teacher", flow_run_name="{share.order.title}, shared", persist_result=False)
def ask_teacher(share: Share) -> "State[None]":
    """Make pieces of a teacher cache until all are done or claimed."""
    return _answer(share)


def ask_elsewhere(
    order: Order, records: Mapping[str, Record], recipe: Recipe, threads: int, store: ArtifactStore
) -> None:
    """Have the recipe's workers make the pieces of a teacher cache, where they work elsewhere.

    Does nothing for other orders, and where the artifact exists.

    Raises:
        RecipeError: the deployment does not exist, or prefect-ray is not installed.
        StageError: a worker failed, or no worker took a run; the message says which.
    """
    over, workers = recipe.execution.cache_over, recipe.execution.cache_workers
    if order.stage != CACHE_TEACHER or over == "processes" or workers == 1:
        return
    if store.find(order.kind, order.key) is not None:
        return
    share = Share(order=order, records=dict(records), run=uuid.uuid4().hex, threads=threads)
    if over == "ray":
        _over_ray(share, workers)
    else:
        _over_prefect(share, workers, recipe.execution.cache_deployment)


def _answer(share: Share) -> "State[None]":
    hide_secrets_in_logs()
    return concluded(share.order.title, lambda: _work(share))


def _work(share: Share) -> "State[None]":
    with ShownProgress(share.order.title, get_run_logger()) as progress:
        work_share(share, progress)
    return Completed(message="no piece is left unclaimed")


def _over_prefect(share: Share, workers: int, deployment: str) -> None:
    title, lost, runs = share.order.title, 0, list[FlowRun]()
    parameters = {"share": share.model_dump(mode="json")}
    try:
        for _ in range(workers):
            name = f"{title}, shared"
            runs.append(start_run(deployment, name, parameters, **SETTINGS))
        for state in await_ends(runs, deployment, title):
            if state.is_failed():
                raise StageError(f"{title}: {state.message}")
            lost += not state.is_completed()
    finally:
        cancel_runs(runs)
    if lost:
        get_run_logger().warning("%s: %d runs were lost; what they left is made here", title, lost)


def _over_ray(share: Share, workers: int) -> None:
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise RecipeError(
            f"execution.cache_over: ray needs prefect-ray ({error}); "
            "pip install 'stillroom[ray]', or take processes or prefect"
        ) from error
    runner = RayTaskRunner(address=os.environ.get("RAY_ADDRESS"))

    @flow(
        name="ask-teacher-on-ray",
        flow_run_name=f"{share.order.title}, shared",
        task_runner=runner,
        persist_result=False,
    )
    def on_ray() -> "list[State[Any]]":
        futures = [_task.submit(share) for _ in range(workers)]
        for future in futures:
            future.wait()
        return [future.state for future in futures]

    state: State[Any] = on_ray(return_state=True)
    if state.is_failed() or state.is_crashed():
        raise StageError(f"{share.order.title}: {state.message}")


@task(name="ask teacher", persist_result=False)
def _task(share: Share) -> "State[None]":
    return _answer(share)
