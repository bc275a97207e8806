"""Documents from files and from the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.data.documents import Document, Message, paragraphs
from stillroom.errors import DataError, SourceError

Format = Literal["auto", "txt", "jsonl", "csv", "parquet"]
FORMATS: dict[str, str] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
# A single text file is cut into documents of at least so many characters, so that
# there is something to hold out and standard errors have clusters.
PIECE_CHARACTERS = 2_000


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what."""

    text: str = "text"
    label: str | None = None
    messages: str | None = None
    family: str | None = None

    @property
    def needed(self) -> list[str]:
        """Return the columns that must be there."""
        content = self.messages or self.text
        return [content, *(name for name in (self.label, self.family) if name)]


def read_documents(
    path: Path,
    *,
    format: Format = "auto",
    text_column: str = "text",
    label_column: str | None = None,
    messages_column: str | None = None,
    family_column: str | None = None,
) -> list[Document]:
    """Read the documents of a file, or of all files below a folder in sorted order.

    txt: a folder gives one document a file; a single file is cut at blank lines, or at line ends
    where there is no blank line, into documents of at least 2 000 characters. jsonl, csv (commas),
    tsv (tabs, quotes are plain characters) and parquet: one document a row; `messages_column`
    holds lists of {role, content}, in csv as JSON, and takes the place of the text. `auto` goes by
    the files' endings. Text is UTF-8.

    Raises:
        SourceError: no such file, no file of that format, or it cannot be read.
        DataError: a column is missing, a value is of the wrong kind, bytes are not UTF-8, a
            character is half of one, or there is no text at all.
    """
    columns = Columns(text_column, label_column, messages_column, family_column)
    files = _list_files(path, format)
    documents: list[Document] = []
    for file in files:
        kind = FORMATS[file.suffix.lower()] if format == "auto" else format
        name = file.name if file == path else file.relative_to(path).as_posix()
        documents += _read_file(file, kind, columns, name, alone=len(files) == 1)
    if not any(document.content.strip() for document in documents):
        raise DataError(f"text expected in {path}: it is empty; give a file that holds text")
    return documents


def documents_from_rows(
    rows: Sequence[Mapping[str, Any]] | Iterator[Mapping[str, Any]], columns: Columns, name: str
) -> list[Document]:
    """Return one document a row; `name` says in errors where the rows come from.

    Raises:
        DataError: a needed column is missing from a row, or holds the wrong kind of value, or
            half of a character.
    """
    return [_document(row, columns, name, i) for i, row in enumerate(rows)]


def _list_files(path: Path, format: Format) -> list[Path]:
    if path.is_file():
        if format == "auto" and path.suffix.lower() not in FORMATS:
            raise SourceError(
                f"a file ending in {', '.join(FORMATS)} expected: {path.name} came; "
                "say its format, or rename it"
            )
        return [path]
    if not path.is_dir():
        raise SourceError(f"a file or folder of text expected at {path}: there is none")
    wanted = {suffix for suffix, kind in FORMATS.items() if format in ("auto", kind)}
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in wanted
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise SourceError(
            f"files ending in {', '.join(sorted(wanted))} expected below {path}: none"
        )
    return files


def _read_file(
    file: Path, kind: str, columns: Columns, name: str, *, alone: bool
) -> list[Document]:
    match kind:
        case "txt":
            return _split_text(_read_text(file), name) if alone else [_whole(file, name)]
        case "jsonl":
            return documents_from_rows(_json_rows(_read_text(file), file), columns, name)
        case "csv":
            return documents_from_rows(_csv_rows(file, columns), columns, name)
        case _:
            return documents_from_rows(_parquet_rows(file, columns), columns, name)


def _whole(file: Path, name: str) -> Document:
    return Document(text=_read_text(file), name=name)


def _split_text(text: str, name: str) -> list[Document]:
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    # Some corpora have a paragraph a line and no blank lines.
    blocks, between = paragraphs(text), "\n\n"
    if len(blocks) == 1:
        blocks, between = text.splitlines(), "\n"
    for block in blocks:
        current.append(block)
        size += len(block)
        if size >= PIECE_CHARACTERS:
            pieces.append(between.join(current))
            current, size = [], 0
    if current:
        pieces.append(between.join(current))
    return [Document(text=piece, name=f"{name}#{i}") for i, piece in enumerate(pieces)]


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"a readable file expected at {file}: {error.strerror}") from error


def _read_text(file: Path) -> str:
    try:
        text = _read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"UTF-8 text expected in {file}: byte {error.start} is "
            f"0x{error.object[error.start]:02x} ({error.reason}); convert the file to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_rows(text: str, file: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"one JSON object a line expected in {file}: line {number}, {error.msg}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"one JSON object a line expected in {file}: line {number} is not one")
        yield row


def _csv_rows(file: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv

    text = _read_text(file)
    if not text.strip():
        return iter(())
    tabs = file.suffix.lower() == ".tsv"
    parse = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
    )
    data = text.encode()
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            # One block: a quoted text may be longer than the default block.
            read_options=csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1)),
            parse_options=parse,
            convert_options=csv.ConvertOptions(
                column_types={name: pa.string() for name in columns.needed},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"a table with a header line expected in {file}: {error}") from error
    return _table_rows(table, columns, file)


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"a Parquet file expected at {file}: {error}") from error
    return _table_rows(table, columns, file)


def _table_rows(table: Any, columns: Columns, file: Path) -> Iterator[Mapping[str, Any]]:
    missing = [name for name in columns.needed if name not in table.column_names]
    if missing:
        raise DataError(_missing(missing[0], table.column_names, str(file)))
    for name in columns.needed:
        if (count := table.column_names.count(name)) > 1:
            raise DataError(
                f"one column {name!r} expected in {file}: {count} are named so; rename the others"
            )
    for batch in table.select(columns.needed).to_batches():
        yield from batch.to_pylist()


def _missing(column: str, there: Sequence[str], name: str) -> str:
    return f"column {column!r} expected in {name}: the columns are {', '.join(there) or 'none'}"


def _document(row: Mapping[str, Any], columns: Columns, name: str, i: int) -> Document:
    for column in columns.needed:
        if column not in row:
            raise DataError(_missing(column, list(row), f"{name}, row {i}"))
    label = None if columns.label is None else _label(row[columns.label], columns.label, name, i)
    value = None if columns.family is None else row[columns.family]
    family = "" if value is None else str(value)
    where = f"{name}#{i}"
    if columns.messages is not None:
        messages = _messages(row[columns.messages], columns.messages, where)
        return Document(messages=messages, label=label, name=where, family=family)
    text = row[columns.text]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"text expected in column {columns.text!r} of {where}: {type(text).__name__} came"
        )
    _require_characters(text or "", columns.text, where)
    return Document(text=text or "", label=label, name=where, family=family)


def _label(value: Any, column: str, name: str, i: int) -> str:
    if value is None or value == "" or not isinstance(value, str | int):
        raise DataError(
            f"a class name or number expected in column {column!r} of {name}#{i}: {value!r} came"
        )
    _require_characters(str(value), column, f"{name}#{i}")
    return str(value)


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"JSON expected in column {column!r} of {where}: {error.msg}"
            ) from error
    if not isinstance(value, list) or not value:
        raise DataError(f"a list of messages expected in column {column!r} of {where}: none came")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            came = ", ".join(fields) if fields else type(message).__name__
            raise DataError(
                f"messages with the texts 'role' and 'content' expected in column {column!r} of "
                f"{where}: {came} came"
            )
        for field in ("role", "content"):
            _require_characters(fields[field], column, where)
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _require_characters(text: str, column: str, where: str) -> None:
    # JSON can hold one half of a character beyond 16 bits; no tokenizer takes it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"whole characters expected in column {column!r} of {where}: character {error.start} "
            f"is \\u{ord(text[error.start]):04x}, one half of an emoji or the like that was cut; "
            "cut the text elsewhere, or take the half away"
        ) from error
