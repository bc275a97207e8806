"""Registered versions as others see them: what a reference names, its files, what must stay."""

from pathlib import Path
from typing import Any

from stillroom.errors import ServiceUnreachableError, SourceError
from stillroom.pull import fetch, find, reaching
from tasks.registry import TAG_BASE_KEY, TAG_CONTENT
from tasks.tracking import TAG_KEY, connect

VERSIONS_AT_ONCE = 1000


def registered_keys(client: Any) -> set[str]:
    """Return the artifact keys of all registered versions and of the bases they sit on.

    Raises:
        ServiceUnreachableError: MLflow cannot be asked, so nothing is known to be unregistered.
    """
    from mlflow.exceptions import MlflowException

    keys: set[str] = set()
    token = None
    try:
        while True:
            page = client.search_model_versions(max_results=VERSIONS_AT_ONCE, page_token=token)
            for version in page:
                keys |= {
                    version.tags[tag] for tag in (TAG_KEY, TAG_BASE_KEY) if tag in version.tags
                }
            token = page.token
            if not token:
                return keys - {""}
    except MlflowException as error:
        raise ServiceUnreachableError(
            f"MLflow did not say which artifacts are registered ({str(error)[:200]}): nothing may "
            "be removed until it does"
        ) from error


def find_version(reference: str) -> tuple[str, str, str] | None:
    """Return name, version and content identity of a registered reference, or None.

    Raises:
        ServiceUnreachableError: MLflow does not answer.
    """
    client = _here()
    try:
        version = find(client, reference)
    except SourceError:
        return None
    with reaching(client.tracking_uri):
        found = client.get_model_version(version.name, version.version)
    identity = found.tags.get(TAG_CONTENT) or f"{version}:{found.source}"
    return version.name, version.version, identity


def download_version(reference: str, folder: Path) -> Path:
    """Return a folder with the verified files of a registered base.

    Raises:
        SourceError: there is no such version, or it is an adapter.
    """
    client = _here()
    target = folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if fetch(client, find(client, reference), target).kind != "base":
        raise SourceError(f"{reference} is an adapter; name the model it sits on, or a merged one")
    return target


def _here() -> Any:
    from tasks.settings import Settings

    return connect(Settings().tracking_uri)
