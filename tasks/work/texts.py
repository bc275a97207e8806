"""Read the texts that a recipe names, wherever they are."""

from pathlib import Path
from typing import Any

from stillroom.data.corpora import builtin_documents
from stillroom.data.documents import Document
from stillroom.data.files import Columns, read_documents
from stillroom.data.hub import read_hub
from tasks.sources import fetch_folder
from tasks.work.bench import Bench


def read_texts(bench: Bench, role: str) -> list[Document]:
    """Return the documents of the source in `role`, read as the section of that name says."""
    source, text = bench.source(role), bench.section[role]
    match source.place:
        case "builtin":
            return builtin_documents(source.reference.removeprefix("builtin:"))
        case "hub":
            return read_hub(
                source.reference,
                revision=source.identity,
                config=text["config"],
                split=text["split"],
                columns=Columns(text["text_column"], text["label_column"], text["messages_column"]),
            )
        case _:
            return _read_files(fetch_folder(source, bench.scratch / role), text)


def _read_files(path: Path, text: dict[str, Any]) -> list[Document]:
    return read_documents(
        path,
        format=text["format"],
        text_column=text["text_column"],
        label_column=text["label_column"],
        messages_column=text["messages_column"],
    )
