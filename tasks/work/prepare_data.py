"""Turn texts into rows of tokens: to learn from, to measure on, to calibrate with."""

from pathlib import Path
from typing import Any

from stillroom.data.corpora import builtin_documents
from stillroom.data.documents import Document
from stillroom.data.files import Columns, read_documents
from stillroom.data.hub import read_hub
from stillroom.data.prepare import PrepareOptions, prepare, save_prepared
from stillroom.models import load_tokenizer, tokenizer_hash
from tasks.sources import fetch_folder
from tasks.work.bench import Bench, Result

OPTIONS = PrepareOptions.__dataclass_fields__.keys() - {"seed"}


def work(bench: Bench) -> Result:
    """Write training, evaluation and calibration rows."""
    section = bench.section
    train = _read(bench, "train")
    evaluation = _read(bench, "evaluation") if "evaluation" in bench.order.sources else None
    tokenizer = load_tokenizer(bench.inputs["teacher"])
    options = PrepareOptions(seed=bench.order.seed, **{name: section[name] for name in OPTIONS})
    data = prepare(options, train, evaluation, tokenizer, tokenizer_hash(tokenizer), bench.progress)
    save_prepared(data, bench.output)
    return Result(licence="as its texts", metrics=data.statistics)


def _read(bench: Bench, role: str) -> list[Document]:
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
