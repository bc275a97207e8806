"""The road of a search for the intrinsic dimension: planning and running walk the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic

from flows.orders import A, Orders
from flows.plan import Planned, PlannedStage, print_stages, print_total, resolve_or_leave
from stillroom.config import IntrinsicDimension
from stillroom.intrinsic_dimension.search import Trial, next_trials
from tasks.stages import Order, as_json
from tasks.store.store import ArtifactStore
from tasks.trials import search_of


@dataclass(frozen=True)
class Searched(Generic[A]):
    """What a search leaves behind: what they come to, and the finished trials with their scores."""

    base: A
    found: A
    trials: dict[Trial, A]
    scores: dict[Trial, float]


DoAll = Callable[[Sequence[Order], dict[str, A]], list[A]]
Score = Callable[[A], float | None]


def walk_search(
    recipe: IntrinsicDimension, orders: Orders[A], do_all: DoAll[A], score: Score[A]
) -> Searched[A] | None:
    """Order a search round by round, a round's trials together; return what they come to.

    None where a score is not known yet, so that the rounds after it are not either.
    """
    base = orders.import_model("import model")
    data = orders.prepare_data("prepare data", recipe.data, base)
    writing: Orders[Any] = Orders(orders.recipe, orders.resolve, lambda order, _: order)
    search = search_of(as_json(recipe.search), recipe.task, recipe.seed)
    finished: dict[Trial, A] = {}
    scores: dict[Trial, float] = {}
    while trials := next_trials(search, scores):
        written = [writing.run_trial(trial, recipe, base, data) for trial in trials]
        made = dict(zip(trials, do_all(written, {"base": base, "data": data}), strict=True))
        known = {trial: score(artifact) for trial, artifact in made.items()}
        finished |= made
        scores |= {trial: value for trial, value in known.items() if value is not None}
        if len(scores) < len(finished):
            return None
    found = orders.fit_dimension(recipe.search, finished)
    return Searched(base, found, finished, scores)


def plan_search(
    recipe: IntrinsicDimension, store: ArtifactStore
) -> tuple[list[PlannedStage], bool]:
    """Return the stages that are known in order, and whether they are all.

    Raises:
        SourceError: a local source is not there.
        StoreError: the store cannot be read.
    """
    shared = recipe.shared_part()
    planned = Planned(shared, store)

    def take_all(orders: Sequence[Order], inputs: dict[str, PlannedStage]) -> list[PlannedStage]:
        return [planned.take(order, inputs) for order in orders]

    def score(line: PlannedStage) -> float | None:
        record = store.find(line.kind, line.key) if line.cached else None
        return None if record is None else record.metrics["score"]

    orders = Orders(shared, cache(resolve_or_leave), planned.take)
    end = walk_search(recipe, orders, take_all, score)
    return planned.stages, end is not None


def print_search(
    recipe: IntrinsicDimension, stages: list[PlannedStage], whole: bool
) -> Iterator[str]:
    """Yield the plan of a search as lines of text."""
    yield from print_stages(stages)
    search = recipe.search
    if not whole:
        yield (
            "then: dimensions between the last that fails and the first that reaches, "
            f"{search.seeds} trials each, until they are within a factor of {search.tolerance:g}"
        )
    register = f", register {recipe.publish.name}-subspace" if recipe.publish else ""
    yield "then: write the report" + register
    yield print_total(stages)
