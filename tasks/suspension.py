"""A flow run that waits for an answer: suspended, so that no process and no worker is held."""

from datetime import timedelta
from typing import NoReturn

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from stillroom.errors import MismatchError, StageError
from tasks.approval import Answer, Question


class Approval(RunInput):
    """The form that Prefect shows where the run is resumed."""

    approve: bool = Field(
        description="On: the alias moves. Off: it stays where it is, and the run ends as Refused."
    )
    comment: str = Field("", description="Why; kept with the registered versions.")


def can_suspend() -> bool:
    """Return whether Prefect could resume this flow run: a deployment's, ordered by no other."""
    run = _flow_run()
    return run.deployment_id is not None and run.parent_task_run_id is None


def given_answer(question: Question) -> Answer | None:
    """Return what this flow run was resumed with; None where it has not asked this question yet.

    Raises:
        MismatchError: it was resumed without an answer.
    """
    run, prefix = _flow_run().id, _input_prefix(question)
    with get_client(sync_client=True) as client:
        asked = client.read_flow_run(run).empirical_policy.pause_keys or set()
        if _pause_key(question) not in asked:
            return None
        found = client.filter_flow_run_input(run, f"{prefix}-response", 1, set())
    if not found:
        raise MismatchError(
            f"the run goes on without an answer: {question.sentence} Run it again to be asked "
            f"again, or answer with `python -m flows approve {question.versions[0]}`"
        )
    form = Approval(**found[0].decoded_value)
    time = found[0].created
    assert time is not None  # it comes from the server
    return Answer(form.approve, form.comment.strip(), f"someone in Prefect, flow run {run}", time)


def suspend(question: Question, page: str, wait: timedelta) -> NoReturn:
    """Show the form and end this process; whoever fills the form in has the flow run begin anew.

    Raises:
        Pause: Prefect's signal, which ends the process.
    """
    # A run that is run again after its time was over asks under the same name.
    run = _flow_run().id
    with get_client(sync_client=True) as client:
        for stale in client.filter_flow_run_input(run, _input_prefix(question), 3, set()):
            client.delete_flow_run_input(run, stale.key)
    suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description=f"{question.sentence}\n\n{page}"),
        timeout=max(1, round(wait.total_seconds())),
        key=_pause_key(question),
    )
    raise StageError(f"Prefect did not suspend the run, which was to ask: {question.sentence}")


def _flow_run() -> FlowRun:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return context.flow_run


def _pause_key(question: Question) -> str:
    return f"approval-{question.key}"


def _input_prefix(question: Question) -> str:
    """Return how the names begin under which Prefect keeps form and answer."""
    return f"suspended-{_pause_key(question)}"
