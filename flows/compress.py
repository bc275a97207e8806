"""Make a small model from a large one: the main flow, read from top to bottom."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.ask_teacher import ask_elsewhere
from flows.orders import Orders, Resolve
from flows.plan import planned_keys, resolver
from flows.road import Made, Measured, walk
from stillroom.config import BASE_TEXT, Publish, Recipe
from stillroom.errors import StageError, StillroomError
from stillroom.hardware import threads_here
from tasks.explain import concluded
from tasks.journal import Journal
from tasks.judge import Candidate, judge_candidate
from tasks.outcome import Outcome
from tasks.publish import Publication, current_champion, register_models, settle_publication
from tasks.registry import Registered
from tasks.report import Role, Shown, write_report
from tasks.run_stage import run_stage
from tasks.stages import Order
from tasks.store.record import Record
from tasks.suspension import can_suspend, given_answer, suspend
from tasks.workers import Workers


@flow(name="compress", flow_run_name="{recipe.name}", persist_result=False)
def compress(recipe: Recipe) -> "State[Outcome]":
    """Make a small model from a large one, measure it, gate it and register it.

    Every stage whose artifact is in the store already is Cached, and one that a crash interrupted
    goes on from its last checkpoint. So does a run that was suspended until someone approved.
    """
    return concluded(recipe.name, lambda: judged(make(recipe, resolver())))


def judged(outcome: Outcome) -> "State[Outcome]":
    """Return the state in which a run ends that came to this."""
    if not outcome.gates_passed or outcome.approval == "refused":
        return Failed(name="Refused", message=outcome.summary, data=outcome)
    return Completed(message=outcome.summary, data=outcome)


def make(recipe: Recipe, resolve: Resolve) -> Outcome:
    """Walk the road and return what stands at its end.

    Raises:
        StillroomError: something failed for a reason that the user can act on.
    """
    with Journal.begin(recipe) as journal, journal.store.lease(*planned_keys(recipe, resolve)):
        orders = Orders(recipe, resolve, Runner(recipe, journal))
        made = walk(recipe, orders)
        champion = current_champion(recipe, journal)
        gates = judge_candidate(
            _candidate(made, evaluate_champion(recipe, orders, made, champion)),
            recipe.gates,
            journal,
        )
        bases = made.bases(recipe.publish.name) if recipe.publish else {}
        published = register_models(recipe, bases, made.adapters, gates, champion, journal)
        report = partial(write_report, recipe, _shown(made), gates, journal=journal)
        if recipe.publish and published.question and not published.answer:
            published = await_approval(recipe.publish, published, report, journal)
        return report(published)


def await_approval(
    publish: Publish,
    published: Publication,
    report: Callable[[Publication], Outcome],
    journal: Journal,
) -> Publication:
    """Return what is published once someone has answered, or as it is where none can be asked here.

    Raises:
        Pause: the flow run is suspended; it begins anew when it is resumed with the answer.
    """
    question = published.question
    assert question is not None
    if not can_suspend():
        return published
    answer = given_answer(question)
    if answer is None:
        wait = timedelta(hours=publish.approval_timeout_hours)
        page = report(published).page
        journal.wait_until(datetime.now(UTC) + wait)
        suspend(question, page, wait)
    return settle_publication(published, answer, journal)


def evaluate_champion(
    recipe: Recipe, orders: Orders[Record], made: Made[Record], champion: Registered | None
) -> Record | None:
    """Have the champion measured on the same text, where a gate compares with it."""
    if champion is None or recipe.gates.max_champion_loss_nats is None:
        return None
    if champion.artifact_key == made.final.key:
        return made.road[-1].evaluation
    model = orders.import_champion(champion.uri)
    return orders.evaluate_model("evaluate champion", made.teacher, model, made.data)


class Runner:
    """Have each order done by a Prefect task."""

    def __init__(self, recipe: Recipe, journal: Journal) -> None:
        self.recipe = recipe
        self.threads = recipe.execution.threads or threads_here()
        self.journal = journal
        self.workers = Workers(recipe.execution, journal.store)

    def __call__(self, order: Order, artifacts: Mapping[str, Record]) -> Record:
        """Return the record of the artifact that `order` asks for.

        Raises:
            StillroomError: it could not be made; the message says why.
        """
        ask_elsewhere(order, artifacts, self.recipe, self.threads, self.journal.store)
        state: State[Any] = run_stage(
            order, artifacts, self.threads, self.journal, self.workers, return_state=True
        )
        if state.is_failed():
            error = state.result(raise_on_failure=False)
            kind = type(error) if isinstance(error, StillroomError) else StageError
            raise kind(f"{order.title}: {state.message}")
        record = state.result()
        assert isinstance(record, Record)
        return record


def _candidate(made: Made[Record], champion: Record | None) -> Candidate:
    first, last = made.road[0], made.road[-1]
    evaluations = {row.model.key: row.evaluation for row in made.measured}
    merged = {name: (model, evaluations[model.key]) for name, model in made.merged.items()}
    return Candidate(last.model, last.evaluation, first.evaluation, champion, merged)


def _shown(made: Made[Record]) -> list[Shown]:
    def role(row: Measured[Record]) -> Role:
        if row.text != BASE_TEXT:
            return "adapter"
        return "control" if row.control else "model"

    return [
        Shown(
            label=row.label,
            text=row.text,
            role=role(row),
            model=row.model,
            evaluation=row.evaluation,
            adapter=row.adapter,
        )
        for row in made.measured
    ]
