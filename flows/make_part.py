"""Make a part of what a recipe says, with all that it takes, and stop there."""

from dataclasses import dataclass

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.compress import Runner
from flows.orders import Resolve
from flows.part import Part, needed_for, without_more
from flows.plan import planned_orders, resolver
from stillroom.config import Recipe
from tasks.explain import concluded
from tasks.journal import Journal
from tasks.store.record import Record


@dataclass(frozen=True)
class PartOutcome:
    """The end of a run that makes a part of the road."""

    summary: str
    artifacts: tuple[str, ...]
    """A line each, in order."""
    mlflow: str


@flow(name="make-part", flow_run_name="{recipe.name}, {until}", persist_result=False)
def make_part(recipe: Recipe, until: Part) -> "State[PartOutcome]":
    """Make a part of what a recipe says; a run of the whole then finds it Cached.

    Args:
        recipe: what is made, and from what.
        until: the part after which it stops; nothing is gated or registered.
    """

    def make() -> "State[PartOutcome]":
        outcome = make_until(recipe, until, resolver())
        return Completed(message=outcome.summary, data=outcome)

    return concluded(recipe.name, make)


def make_until(recipe: Recipe, until: Part, resolve: Resolve) -> PartOutcome:
    """Make the part, and return what stands at its end.

    Raises:
        StillroomError: something failed for a reason that the user can act on.
    """
    with Journal.begin(recipe) as journal:
        orders = planned_orders(without_more(recipe, until), resolve)
        keys, runner = needed_for(until, orders), Runner(recipe, journal)
        made: dict[str, Record] = {}
        with journal.store.lease(*keys):
            for key in keys:
                taken = {role: made[each] for role, each in orders[key].inputs.items()}
                made[key] = runner(orders[key], taken)
        return _outcome(until, journal)


def _outcome(until: Part, journal: Journal) -> PartOutcome:
    new = sum(not entry.cached for entry in journal.lineage)
    return PartOutcome(
        summary=f"all that {until.replace('_', ' ')} takes is made: {new} of "
        f"{len(journal.lineage)} stages now, the others before",
        artifacts=tuple(
            f"{entry.stage}: {entry.key[:12]}{' (cached)' if entry.cached else ''}"
            for entry in journal.lineage
        ),
        mlflow=journal.link,
    )
