"""What a recipe would do, without doing it: stages, keys, what is there, time and memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flows.estimate import Estimate, estimate
from flows.orders import Orders, Resolve
from flows.part import Part, needed_for, without_more
from flows.road import walk
from flows.shape import Shape, model_shape
from stillroom.config import Model, Recipe, Text
from stillroom.errors import RecipeError, SourceError, StillroomError
from tasks.errand import ELSEWHERE
from tasks.reach import as_read, places_of, require_within_reach
from tasks.settings import Settings
from tasks.sources import Source, place_of, resolve_model, resolve_text
from tasks.stages import Order
from tasks.store.store import ArtifactStore

UNRESOLVED = "unresolved:"
MOST_LISTED = 8


@dataclass(frozen=True)
class PlannedStage:
    """A line of the plan."""

    order: Order
    takes: tuple[str, ...]
    resolved: bool
    cached: bool
    estimate: Estimate

    @property
    def kind(self) -> str:
        """Kind of the artifact."""
        return self.order.kind

    @property
    def key(self) -> str:
        """Key of the artifact; one that rests on an unresolved source is only a stand-in."""
        return self.order.key


def resolve_source(place: Model | Text) -> Source:
    """Return what a model or text of the recipe points at now.

    Raises:
        RecipeError: a revision or the like is named of what is not on the hub.
        SourceError: it points at nothing, or the place cannot be asked.
    """
    _require_hub(place)
    resolve = resolve_model if isinstance(place, Model) else resolve_text
    return resolve(place.source, place.revision)


def _require_hub(place: Model | Text) -> None:
    """Refuse what is read of hub ids alone where the source is none: nobody would go by it."""
    where = place_of(place.source)
    names = ("revision", "config", "split") if isinstance(place, Text) else ("revision",)
    for name in names:
        value = getattr(place, name)
        if where != "hub" and value != type(place).model_fields[name].default:
            here = "there is a file or folder of that name here" if where == "local" else where
            raise RecipeError(
                f"{place.source}: {name} {value!r} is for a hub id, and this is none ({here}); "
                "leave it out, or correct the source"
            )


def resolver(own: Recipe | None = None) -> Resolve:
    """Return what resolves the sources of a run's recipe, each once.

    One that a server ordered resolves what is within its reach: no path of ours by name. What a
    recipe of the operator's `own` names is within reach.

    Raises:
        SourceError: it points at nothing, cannot be asked, or is out of reach.
    """
    if not _was_ordered():
        return cache(resolve_source)
    settings, listed = Settings(), places_of(own) if own else frozenset()

    def resolve_within_reach(place: Model | Text) -> Source:
        if as_read(place) not in listed:
            require_within_reach(place, settings)
        return resolve_source(place)

    return cache(resolve_within_reach)


def _was_ordered() -> bool:
    """Return whether a deployment's run is under way, be it around this one."""
    from prefect.context import FlowRunContext
    from prefect.runtime import deployment

    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is not None and run.parent_task_run_id is None:
        return run.deployment_id is not None
    return deployment.id is not None  # Prefect's server may be asked


def resolve_or_leave(place: Model | Text) -> Source:
    """Return the resolved source, or one marked unresolved where its server cannot be asked.

    A local path or a builtin that is not there is an error all the same.

    Raises:
        RecipeError: as `resolve_source`.
        SourceError: nothing is there.
    """
    try:
        return resolve_source(place)
    except RecipeError:
        raise
    except StillroomError:
        where = place_of(place.source)
        if where in ("local", "builtin"):
            raise
        return Source(place.source, where, UNRESOLVED + place.source)


def plan(recipe: Recipe, store: ArtifactStore, until: Part | None = None) -> list[PlannedStage]:
    """Return the stages of `recipe` in order; with `until`, those alone that this part takes.

    Raises:
        RecipeError: the recipe has no such part.
        SourceError: a local source is not there.
        StoreError: the store cannot be read.
    """
    if until:
        recipe = without_more(recipe, until)
    planned = Planned(recipe, store)
    walk(recipe, Orders(recipe, cache(resolve_or_leave), planned.take))
    if until is None:
        return planned.stages
    stages = {stage.key: stage for stage in planned.stages}
    orders = {key: stage.order for key, stage in stages.items()}
    return [stages[key] for key in needed_for(until, orders)]


class Planned:
    """The stages that were ordered so far, none of them done."""

    def __init__(self, recipe: Recipe, store: ArtifactStore) -> None:
        self.recipe = recipe
        self.store = store
        self.shape = _shape(recipe)
        self._by_key: dict[str, PlannedStage] = {}

    @property
    def stages(self) -> list[PlannedStage]:
        """Each stage once, in order."""
        return list(self._by_key.values())

    def take(self, order: Order, artifacts: dict[str, PlannedStage]) -> PlannedStage:
        """Return the line of the plan for an order."""
        sources = order.sources.values()
        resolved = all(not source.identity.startswith(UNRESOLVED) for source in sources) and all(
            artifact.resolved for artifact in artifacts.values()
        )
        cached = resolved and self.store.find(order.kind, order.key) is not None
        takes = tuple(dict.fromkeys(artifact.order.title for artifact in artifacts.values()))
        need = estimate(order, self.recipe, self.shape)
        line = PlannedStage(order, takes, resolved, cached, need)
        return self._by_key.setdefault(order.key, line)


def planned_keys(recipe: Recipe, resolve: Resolve) -> list[str]:
    """Return the keys of all that the recipe makes or takes, in order."""
    return list(planned_orders(recipe, resolve))


def planned_orders(recipe: Recipe, resolve: Resolve) -> dict[str, Order]:
    """Return the orders for all that the recipe makes or takes by their keys, each once, in order.

    Raises:
        SourceError: a source points at nothing, cannot be asked, or is out of reach.
    """

    def take(order: Order, artifacts: dict[str, Order]) -> Order:
        return orders.setdefault(order.key, order)

    orders: dict[str, Order] = {}
    walk(recipe, Orders(recipe, resolve, take))
    return orders


def print_plan(
    recipe: Recipe, stages: list[PlannedStage], until: Part | None = None
) -> Iterator[str]:
    """Yield the plan as lines of text."""
    yield from print_stages(stages)
    sent = [stage.order.title for stage in stages if stage.order.stage in ELSEWHERE]
    if recipe.execution.over == "workers" and sent:
        yield f"on workers of {recipe.execution.deployment}: {', '.join(sent)}"
    if until is None:
        yield "then: check the gates, write the report, " + _publication(recipe)
    yield print_total(stages)


def print_stages(stages: list[PlannedStage]) -> Iterator[str]:
    """Yield a line for each stage below one that names the columns."""
    width = max(len(stage.order.title) for stage in stages)
    yield f"{'stage':<{width}}  {'key':<12}  {'state':<8}  {'memory':>8}  {'time':>7}  takes"
    for stage in stages:
        key = stage.key[:12] if stage.resolved else "source open "
        state = "cached" if stage.cached else "to do"
        memory = f"{stage.estimate.memory_bytes / 1e9:.1f} GB"
        time = "" if stage.cached else _minutes(stage.estimate.seconds)
        takes = _listed(stage.takes) or "its source"
        yield f"{stage.order.title:<{width}}  {key}  {state:<8}  {memory:>8}  {time:>7}  {takes}"


def print_total(stages: list[PlannedStage]) -> str:
    """Return how many stages are to do, how long they take, and how much memory."""
    todo = [stage for stage in stages if not stage.cached]
    seconds = sum(stage.estimate.seconds for stage in todo)
    peak = max((stage.estimate.memory_bytes for stage in todo), default=0)
    return (
        f"{len(todo)} of {len(stages)} stages to do: about {_minutes(seconds)} on this machine's "
        f"processors, at most {peak / 1e9:.1f} GB of memory at a time"
    )


def _publication(recipe: Recipe) -> str:
    if recipe.publish is None:
        return "publish nothing"
    names = [recipe.publish.name]
    for each in recipe.adapters:
        names.append(f"{recipe.publish.name}-{each.name}")
        if each.method == "lora" and each.merge:
            names.append(f"{names[-1]}-merged")
    said = f"register {', '.join(names)}"
    if recipe.publish.approval:
        return f"{said} and ask for an approval before the alias {recipe.publish.alias} moves"
    return f"{said} and move the alias {recipe.publish.alias}"


def _listed(titles: tuple[str, ...]) -> str:
    more = len(titles) - MOST_LISTED
    return ", ".join(titles[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _shape(recipe: Recipe) -> Shape | None:
    """Return the teacher's size, or None where its config is not at hand."""
    teacher = recipe.teacher
    if teacher.config:
        return model_shape(Path(teacher.config))
    try:
        return model_shape(teacher.source)
    except SourceError:
        return None
