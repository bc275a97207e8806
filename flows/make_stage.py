"""Make one stage on a worker: what flows with `execution.over: workers` order of a GPU pool.

The worker reads its own environment: STILLROOM_STORE above all, which must be the store of whoever
ordered. MLflow it does not need: the ordering flow writes down what came of it.
"""

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from tasks.errand import Errand, do_errand
from tasks.explain import concluded
from tasks.progress import ShownProgress
from tasks.quiet_logs import hide_secrets_in_logs


@flow(name="make-stage", flow_run_name="{errand.order.title}", persist_result=False)
def make_stage(errand: Errand) -> "State[None]":
    """Make one stage of a recipe, from artifacts that are in the store."""
    hide_secrets_in_logs()
    return concluded(errand.order.title, lambda: _make(errand))


def _make(errand: Errand) -> "State[None]":
    with ShownProgress(errand.order.title, get_run_logger()) as progress:
        done = do_errand(errand, f"{flow_run.flow_name}/{deployment.name}", progress)
    return Completed(message=done)
