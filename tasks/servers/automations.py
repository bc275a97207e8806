"""The automations of a Prefect server: those of deployments/ that it lacks are created.

One that is there already stays as it is, switched off or changed: it is its operator's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from stillroom.errors import StillroomError

Ask = Callable[[str, str, dict[str, Any]], httpx.Response]
AUTOMATIONS, NOTIFICATIONS = (
    Path(__file__).parents[2] / "deployments" / f"{name}.yaml"
    for name in ("automations", "notifications")
)


def create_automations(api: str, ask: Ask) -> list[str]:
    """Create what a server lacks, and return the names.

    Args:
        api: the address of Prefect's API.
        ask: sends a request, given method, address and body.

    Raises:
        StillroomError: the server refuses one.
    """
    created = []
    for wanted in listed(AUTOMATIONS) + _with_blocks(api, ask, listed(NOTIFICATIONS)):
        named = {"automations": {"name": {"any_": [wanted["name"]]}}}
        if not _answer(ask("POST", f"{api}/automations/filter", named)):
            _answer(ask("POST", f"{api}/automations/", wanted))
            created.append(wanted["name"])
    return created


def listed(file: Path) -> list[dict[str, Any]]:
    """Return the automations that a file describes."""
    automations: list[dict[str, Any]] = yaml.safe_load(file.read_text())["automations"]
    return automations


def _with_blocks(api: str, ask: Ask, automations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the automations whose blocks the server has, with the blocks' ids for their names."""

    def named(automation: dict[str, Any]) -> set[str]:
        return {action["block_document_id"] for action in automation["actions"]}

    names = sorted(set().union(*map(named, automations)))
    wanted = {"block_documents": {"name": {"any_": names}}}
    answer = _answer(ask("POST", f"{api}/block_documents/filter", wanted))
    ids = {document["name"]: document["id"] for document in answer}

    def filled_in(action: dict[str, Any]) -> dict[str, Any]:
        return action | {"block_document_id": ids[action["block_document_id"]]}

    return [
        automation | {"actions": [filled_in(action) for action in automation["actions"]]}
        for automation in automations
        if named(automation) <= set(ids)
    ]


def _answer(response: httpx.Response) -> Any:
    if response.is_error:
        raise StillroomError(
            f"Prefect's server at {response.request.url} refuses an automation: "
            f"{response.status_code} {' '.join(response.text.split())[:400]}"
        )
    return response.json()
