"""Measure a model's intrinsic dimension on a task: a flow, read from top to bottom."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.dimension_road import walk_search
from flows.orders import Orders
from flows.plan import resolver
from stillroom.config import IntrinsicDimension
from stillroom.errors import StageError, StillroomError
from stillroom.hardware import threads_here
from stillroom.intrinsic_dimension.search import best_trial
from tasks.dimension_report import DimensionOutcome, write_dimension_report
from tasks.explain import concluded
from tasks.journal import Journal
from tasks.publish import register_subspace
from tasks.run_stage import run_stage
from tasks.stages import Order
from tasks.store.record import Record
from tasks.workers import Workers


@flow(
    name="measure-intrinsic-dimension",
    flow_run_name="{recipe.name}, intrinsic dimension",
    persist_result=False,
)
def measure_intrinsic_dimension(recipe: IntrinsicDimension) -> "State[DimensionOutcome]":
    """Train a model in random subspaces, and say how few dimensions are nearly as good as all.

    Every trial whose artifact is in the store already is Cached, and one that a crash interrupted
    goes on from its last checkpoint.
    """

    def measure() -> "State[DimensionOutcome]":
        outcome = search(recipe)
        return Completed(message=outcome.summary, data=outcome)

    return concluded(recipe.name, measure)


def search(recipe: IntrinsicDimension) -> DimensionOutcome:
    """Run the trials of the search, round by round, and return what they come to.

    Raises:
        StillroomError: something failed for a reason that the user can act on.
    """
    with Journal.begin(recipe) as journal, TrialRunner(recipe, journal) as runner:
        orders = Orders(recipe.shared_part(), resolver(), runner)
        searched = walk_search(recipe, orders, runner.all, lambda record: record.metrics["score"])
        assert searched is not None  # a finished trial has its score
        outcome = write_dimension_report(recipe, searched.found, journal)
        best = best_trial(outcome.found, searched.scores)
        if recipe.publish is None or best is None:
            return outcome
        versions = register_subspace(recipe, searched.base, searched.trials[best], journal)
        return replace(outcome, versions=tuple(version.uri for version in versions))


class TrialRunner:
    """Have each order done by a Prefect task: one at a time, or several side by side.

    While it is open a clean-up spares what was ordered.
    """

    def __init__(self, recipe: IntrinsicDimension, journal: Journal) -> None:
        self.journal = journal
        self.threads = recipe.execution.threads or threads_here()
        self.workers = recipe.search.workers
        self.elsewhere = Workers(recipe.execution, journal.store)
        self.open = ExitStack()

    def __enter__(self) -> "TrialRunner":
        return self

    def __exit__(self, *error: object) -> None:
        self.open.close()

    def __call__(self, order: Order, artifacts: Mapping[str, Record]) -> Record:
        """Return the record of the artifact that `order` asks for.

        Raises:
            StillroomError: it could not be made; the message says why.
        """
        self.open.enter_context(self.journal.store.lease(order.key))
        state: State[Any] = run_stage(
            order, artifacts, self.threads, self.journal, self.elsewhere, return_state=True
        )
        return _record(order, state)

    def all(self, orders: Sequence[Order], artifacts: dict[str, Record]) -> list[Record]:
        """Return the records of orders that do not wait for each other, some of them side by side.

        Raises:
            StillroomError: one could not be made; those that had begun were ended first.
        """
        self.open.enter_context(self.journal.store.lease(*(order.key for order in orders)))
        pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=self.workers)
        with pool as runner, self.elsewhere:
            submit = partial(self._submit, runner, artifacts)
            states = _side_by_side(orders, submit, self.workers)
        return [_record(order, states[order.key]) for order in orders if order.key in states]

    def _submit(
        self, runner: "ThreadPoolTaskRunner[Any]", artifacts: dict[str, Record], order: Order
    ) -> PrefectFuture[Any]:
        threads = max(1, self.threads // self.workers)
        parameters: dict[str, Any] = {"order": order, "records": artifacts, "threads": threads}
        parameters |= {"journal": self.journal, "workers": self.elsewhere}
        return runner.submit(run_stage, parameters)


def _side_by_side(
    orders: Sequence[Order], submit: Callable[[Order], PrefectFuture[Any]], workers: int
) -> "dict[str, State[Any]]":
    """Return how orders ended, by key; after one has failed those not begun are left."""
    waiting, running = list(orders), dict[PrefectFuture[Any], str]()
    states: dict[str, State[Any]] = {}
    while running or waiting:
        while waiting and len(running) < workers:
            order = waiting.pop(0)
            running[submit(order)] = order.key
        future = next(iter(as_completed(list(running))))
        future.wait()  # sets its state
        key = running.pop(future)
        states[key] = future.state
        if states[key].is_failed():
            waiting.clear()
    return states


def _record(order: Order, state: "State[Any]") -> Record:
    if state.is_failed():
        error = state.result(raise_on_failure=False)
        kind = type(error) if isinstance(error, StillroomError) else StageError
        raise kind(f"{order.title}: {state.message}")
    record = state.result()
    assert isinstance(record, Record)
    return record
