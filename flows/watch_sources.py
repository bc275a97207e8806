"""Look whether what recipes are made from has changed, and order one run for each change."""

import hashlib
from dataclasses import dataclass
from functools import cache

from prefect import flow, get_client, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.plan import planned_orders, resolve_source
from flows.road import merged_name
from stillroom.config import Model, Recipe, Text
from stillroom.errors import RecipeError
from stillroom.pull import parse_reference
from stillroom.redaction import redact
from tasks.explain import explain
from tasks.heartbeat import beating
from tasks.keys import canonical
from tasks.named import RecipeName, load_named, recipe_names
from tasks.named_runs import OrderedRun, last_run, order_run
from tasks.quiet_logs import hide_secrets_in_logs
from tasks.reach import places_of
from tasks.settings import Settings
from tasks.sources import Source, place_of, registry_version
from tasks.stages import EVALUATE_MODEL
from tasks.store.store import open_store

ON_SERVERS = ("registry", "s3")
NEWEST = "latest"
"""The alias by which MLflow itself names a model's newest version."""
ORDERED = "a run"
MOST_SHOWN = 200
"""Characters of a run's last words that the table shows."""


@dataclass(frozen=True)
class Row:
    """A line of the table that the sensor leaves."""

    recipe: str
    changed: str
    ordered: str
    run: str = ""


@dataclass(frozen=True)
class Seen:
    """What a recipe's sources point at now."""

    sources: dict[str, str]
    """Reference to the identity of what is there."""
    key: str
    """Stands for all that is made of them, but for measurements: their keys name a machine."""
    made: bool
    """Whether all of it is in the store."""


@flow(name="watch-sources", persist_result=False)
def watch_sources(recipes: tuple[RecipeName, ...] = ()) -> "State[list[Row]]":
    """Order a run of each recipe whose registered teacher or whose texts have changed.

    One change orders one run, however often and by how many sensors it is seen.

    Args:
        recipes: names of files in the worker's folder of recipes, without their .yaml; none: all
            that name a registered model or S3.
    """
    hide_secrets_in_logs()
    with beating():
        return _look(recipes)


def _look(recipes: tuple[RecipeName, ...]) -> "State[list[Row]]":
    rows: list[Row] = []
    errors: list[str] = []
    try:
        names = recipes or tuple(recipe_names(Settings().recipes))
    except Exception as error:
        names = ()
        errors.append(_line("the folder of recipes", error))
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                rows.append(look_after(name, client, asked=bool(recipes)))
            except Exception as error:
                # One that cannot be asked about must not keep the others waiting.
                errors.append(_line(name, error))
                rows.append(Row(name, "not known", errors[-1]))
    _show(rows)
    if errors:
        return Failed(message="\n".join(errors), data=rows)
    ordered = sum(row.ordered == ORDERED for row in rows)
    return Completed(message=f"{len(rows)} recipes looked at, {ordered} runs ordered", data=rows)


def look_after(name: str, client: SyncPrefectClient, *, asked: bool) -> Row:
    """Order a run of one recipe where its sources have changed, and return what was found.

    Raises:
        StillroomError: the recipe or what it names cannot be read; the message says why.
    """
    recipe = load_named(name, Settings().recipes)
    require_an_end(recipe)
    if not asked and not any(place_of(each.source) in ON_SERVERS for each in places_of(recipe)):
        return Row(name, "it names no registered model and nothing on S3", "nothing")
    seen, before = look_at(recipe), last_run(name, client)
    if before is not None and before.key == seen.key:
        return Row(name, "nothing since that run", _ended(before), before.link)
    if before is None and seen.made:
        return Row(name, "nothing: all of it is made", "nothing")
    run = order_run(name, seen.key, seen.sources, before, client)
    changed = _changes(seen, before)
    get_run_logger().info("%s: %s; ordered %s", name, changed, run.link)
    return Row(name, changed, ORDERED, run.link)


def require_an_end(recipe: Recipe) -> None:
    """Refuse a recipe that would be ordered anew by its own result.

    Raises:
        RecipeError: its teacher is what it publishes.
    """
    publish, source = recipe.publish, recipe.teacher.source
    if publish is None or place_of(source) != "registry":
        return
    name, alias, _ = parse_reference(source)
    merging = [each.name for each in recipe.adapters if each.method == "lora" and each.merge]
    published = {publish.name, *(merged_name(publish.name, each) for each in merging)}
    if name in published and alias in (publish.alias, NEWEST):
        raise RecipeError(
            f"its teacher {recipe.teacher.source} is what it publishes: each run would order the "
            "next; publish under another name or alias, or order its runs by hand"
        )


def look_at(recipe: Recipe) -> Seen:
    """Return what the sources of a recipe of the operator's own point at now.

    Raises:
        SourceError: one points at nothing, or cannot be asked.
        StoreError: the store cannot be read.
    """
    sources: dict[str, str] = {}

    @cache
    def resolve(place: Model | Text) -> Source:
        source = resolve_source(place)
        sources[place.source] = source.identity
        return source

    orders = planned_orders(recipe, resolve).values()
    made = [order for order in orders if order.stage != EVALUATE_MODEL]
    key = hashlib.sha256(canonical([order.key for order in made])).hexdigest()[:16]
    store = open_store(Settings().store_url)
    return Seen(sources, key, all(store.find(each.kind, each.key) for each in made))


def _changes(seen: Seen, before: OrderedRun | None) -> str:
    if before is None:
        return "it is watched from now on, and not all of it is made"
    new = [
        reference
        for reference, identity in seen.sources.items()
        if before.sources.get(reference) != identity
    ]
    return ", ".join(map(_name, new)) or "the recipe, or the code of its stages"


def _name(reference: str) -> str:
    if place_of(reference) != "registry":
        return f"{reference} holds something new"
    return f"{reference} is now version {registry_version(reference)[1]}"


def _ended(run: OrderedRun) -> str:
    """Return what became of a run, and why no second one is ordered where it failed."""
    if run.state.is_completed():
        return "nothing"
    if run.state.is_final():
        said = f": {run.state.message[:MOST_SHOWN]}" if run.state.message else ""
        return f"nothing: it ended as {run.state.name}{said}; choose Retry there when it is mended"
    return f"nothing: it is {run.state.name}"


def _line(name: str, error: Exception) -> str:
    explained = explain(error, name)
    if explained is None:
        get_run_logger().error("%s could not be looked at", name, exc_info=error)
    return f"{name}: {' '.join(redact(str(explained or repr(error))).split())}"


def _show(rows: list[Row]) -> None:
    create_table_artifact(
        table=[vars(row) for row in rows],
        key="watched-sources",
        description="What has changed, and what was ordered for it",
    )
