"""Documents from a dataset on the hub."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from stillroom.data.documents import Document
from stillroom.data.files import Columns, documents_from_rows
from stillroom.errors import DataError, SourceError

COMMIT = re.compile("[0-9a-f]{40}")


def read_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    split: str = "train",
    columns: Columns | None = None,
) -> list[Document]:
    """Read the documents of one split of a hub dataset; class numbers become class names.

    Raises:
        SourceError: the dataset, configuration or split is not there, or not at the pinned commit,
            or there is no network.
        DataError: a column is missing or holds the wrong kind of value, or there is no text.
    """
    columns = columns or Columns()
    dataset = _load(repo_id, revision, config, split)
    missing = [name for name in columns.needed if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"column {missing[0]!r} expected in {repo_id}: the columns are "
            f"{', '.join(dataset.column_names)}"
        )
    documents = documents_from_rows(_rows(dataset, columns), columns, f"{repo_id}/{split}")
    if not any(document.content.strip() for document in documents):
        raise DataError(f"text expected in {repo_id}, split {split}: it is empty")
    return documents


def _load(repo_id: str, revision: str | None, config: str | None, split: str) -> Any:
    import datasets

    # Whichever HTTP library the hub's client works with, this is the root of its errors.
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        builder = datasets.load_dataset_builder(repo_id, config, revision=revision)
        _require_asked_for(builder, repo_id, revision)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (ConnectionError, OfflineModeIsEnabled, HTTPError) as error:
        raise SourceError(
            f"the hub expected to answer for {repo_id}: {_first_line(error)}; connect to the "
            "network and unset HF_HUB_OFFLINE, or name a local file"
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetsError, ValueError) as error:
        raise SourceError(
            f"dataset {repo_id} expected (configuration {config or 'default'}, split {split}, "
            f"revision {revision or 'main'}): {_first_line(error)}; check the names, and log in if "
            "it is not public"
        ) from error


def _require_asked_for(builder: Any, repo_id: str, revision: str | None) -> None:
    """Refuse what `datasets` takes instead of the commit of a dataset on the hub.

    Names of its own loaders, such as text, stand for the files of the working directory; and where
    the hub does not answer, it takes whatever commit it has kept.
    """
    if builder.repo_id != repo_id:
        raise SourceError(
            f"a dataset on the hub expected, {repo_id!r} is none: datasets has a loader of that "
            "name, which would read the working directory; write owner/name, or name a local file"
        )
    if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
        raise SourceError(
            f"dataset {repo_id} expected at commit {revision[:12]}, {builder.hash[:12]} came, "
            "which was kept from earlier: connect to the network and unset HF_HUB_OFFLINE, or pin "
            "that one"
        )


def _rows(dataset: Any, columns: Columns) -> Iterator[Mapping[str, Any]]:
    feature = dataset.features[columns.label] if columns.label else None
    names = getattr(feature, "names", None)
    for row in dataset.select_columns(columns.needed):
        if names and columns.label and isinstance(row[columns.label], int):
            number = row[columns.label]
            # Hub datasets mark rows without a known class with -1.
            label = names[number] if number >= 0 else None
            yield {**row, columns.label: label}
        else:
            yield row


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
