"""Runs of named recipes that were ordered because what they are made from has changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from stillroom.errors import RecipeError

COMPRESS_NAMED = "compress-named/compress-named"
ORIGIN = "watch-sources"
RECENT = 50
"""Runs among which the last is looked for: one that is run again is an old one."""
_SOURCE = "stillroom.source "


@dataclass(frozen=True)
class OrderedRun:
    """A run, and what its recipe's sources were when it was ordered."""

    id: UUID
    state: State[Any]
    key: str
    """Stands for all that the recipe makes of these sources."""
    sources: Mapping[str, str]
    """Reference to the identity of what was there."""

    @property
    def link(self) -> str:
        """The run's page, or its id where the server has no UI."""
        return url_for("flow-run", self.id) or str(self.id)


def last_run(name: str, client: SyncPrefectClient) -> OrderedRun | None:
    """Return the run of a recipe that was ordered last, or None where none was."""
    tags = FlowRunFilterTags(all_=_tags(name))
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=tags),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=RECENT,
    )
    # A run that someone copied in the UI has the tags and no such key.
    ours = [run for run in runs if (run.idempotency_key or "").startswith(f"{ORIGIN}/")]
    newest = max(ours, key=_created, default=None)
    return None if newest is None else _ordered(newest)


def order_run(
    name: str,
    key: str,
    sources: Mapping[str, str],
    before: OrderedRun | None,
    client: SyncPrefectClient,
) -> OrderedRun:
    """Return the run of a recipe for these sources after the run `before`; order it if it is none.

    Who orders the same at the same time gets the same run: the server makes one of a key.

    Raises:
        RecipeError: the server has no deployment for it.
    """
    try:
        deployment = client.read_deployment_by_name(COMPRESS_NAMED)
    except ObjectNotFound as error:
        raise RecipeError(
            f"the Prefect server has no deployment {COMPRESS_NAMED}; register it with `prefect "
            "--no-prompt deploy --all --prefect-file deployments/prefect.yaml`"
        ) from error
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"recipe_name": name},
        tags=_tags(name),
        # With the run before it, so that sources that become what they once were count as new.
        idempotency_key=f"{ORIGIN}/{name}/{key}/{before.id if before else 'first'}",
        labels={f"{_SOURCE}{reference}": identity for reference, identity in sources.items()},
    )
    return _ordered(run)


def _ordered(run: FlowRun) -> OrderedRun:
    assert run.idempotency_key is not None
    assert run.state is not None, "it was ordered as Scheduled"
    return OrderedRun(
        id=run.id,
        state=run.state,
        key=run.idempotency_key.split("/")[2],
        sources={
            label.removeprefix(_SOURCE): str(identity)
            for label, identity in run.labels.items()
            if label.startswith(_SOURCE)
        },
    )


def _created(run: FlowRun) -> float:
    return run.created.timestamp() if run.created else 0.0


def _tags(name: str) -> list[str]:
    return [ORIGIN, f"recipe:{name}"]
