"""Documents, built-in texts, and the files they come from."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillroom.data.corpora import BUILTIN_CORPORA, builtin_documents, corpus_fingerprint
from stillroom.data.documents import Document, number_groups, paragraphs
from stillroom.data.files import Columns, read_documents
from stillroom.data.hub import read_hub
from stillroom.errors import DataError, SourceError


def test_python_docs_are_the_reference_topics() -> None:
    documents = builtin_documents("python-docs")
    assert len(documents) > 60
    assert sum(len(document.text) for document in documents) > 400_000
    assert len({document.family for document in documents}) == len(documents)


def test_python_source_keeps_its_bounds() -> None:
    documents = builtin_documents("python-source")
    names = [document.family for document in documents]
    assert names == sorted(names)
    assert {"textwrap", "ast"} <= set(names)
    assert not {"test", "idlelib", "_sysconfigdata"} & set(names)
    assert all(2_000 <= len(document.text) <= 100_000 for document in documents)


def test_python_docstrings_are_labelled_and_unambiguous() -> None:
    documents = builtin_documents("python-docstrings")
    assert len(documents) > 1_000
    assert len({document.label for document in documents}) == 8
    assert len({document.text for document in documents}) == len(documents)
    assert all(document.family and len(document.text) >= 40 for document in documents)
    assert not any(str(document.label).startswith("_") for document in documents)


@pytest.mark.parametrize("name", ["python-docs", "python-source"])
def test_a_fingerprint_is_of_the_content(name: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", corpus_fingerprint(name))
    assert corpus_fingerprint(name) == corpus_fingerprint(name)
    others = {corpus_fingerprint(other) for other in BUILTIN_CORPORA if "docstrings" not in other}
    assert len(others) == 2


def test_an_unknown_builtin_is_refused() -> None:
    with pytest.raises(SourceError, match=r"one of python-docs.*'python-jokes' came"):
        builtin_documents("python-jokes")


def test_families_are_numbered_in_order_of_appearance() -> None:
    documents = [Document(text="a", family="x"), Document(text="b"), Document(text="c", family="x")]
    assert number_groups([*documents, Document(text="b", name="elsewhere")]) == [0, 1, 0, 1]


def test_paragraphs_stand_between_blank_lines() -> None:
    assert paragraphs("\n\na\nb\n \t\n\n c\n") == ["a\nb", " c\n"]


def test_a_folder_of_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("second\n\nstill second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    documents = read_documents(tmp_path)
    assert [d.text for d in documents] == ["first\nline", "second\n\nstill second"]
    assert [d.name for d in documents] == ["a.txt", "sub/b.txt"]


@pytest.mark.parametrize("between", ["\n\n", "\n"])
def test_a_single_text_is_cut_into_documents(tmp_path: Path, between: str) -> None:
    blocks = [f"{i} " + "x" * 900 for i in range(10)]
    path = tmp_path / "all.txt"
    path.write_text(between.join(blocks))
    documents = read_documents(path)
    assert [len(d.text) > 2_000 for d in documents] == [True, True, True, False]
    assert between.join(d.text for d in documents) == between.join(blocks)


def test_tables_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"body": 'he said "no",\nthen left', "kind": "1", "who": "a"},
        {"body": "", "kind": "0", "who": "b"},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.csv").write_text('body,kind,who\n"he said ""no"",\nthen left",1,a\n,0,b\n')
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    read = [
        read_documents(
            tmp_path / f"t.{ending}", text_column="body", label_column="kind", family_column="who"
        )
        for ending in ("jsonl", "csv", "parquet")
    ]
    plain = [[(d.text, d.label, d.family) for d in documents] for documents in read]
    assert plain[0] == [(row["body"], row["kind"], row["who"]) for row in rows]
    assert plain[1] == plain[0]
    assert plain[2] == plain[0]


def test_a_null_family_is_none(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": str(i), "who": who} for i, who in enumerate([None, None, "a", "a"])]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for ending in ("jsonl", "parquet"):
        documents = read_documents(tmp_path / f"t.{ending}", family_column="who")
        assert [document.family for document in documents] == ["", "", "a", "a"]
        assert len({document.group for document in documents}) == 3


def test_a_tsv_has_tabs_and_plain_quotes(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\n"so what , he said\t1\n')
    documents = read_documents(tmp_path / "dev.tsv", text_column="sentence", label_column="label")
    assert [(d.text, d.label) for d in documents] == [('"so what , he said', "1")]


def test_a_long_quoted_text_is_read(tmp_path: Path) -> None:
    long = "word " * 400_000
    (tmp_path / "long.csv").write_text(f'text\n"{long}"\n')
    assert read_documents(tmp_path / "long.csv")[0].text == long


def test_conversations_are_read_as_lists_and_as_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": messages}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"chat": json.dumps(messages)}))
    documents = read_documents(tmp_path, messages_column="chat")
    assert [d.messages for d in documents] == [tuple(messages)] * 2
    assert documents[0].content == "Hi\n\nHo"


@pytest.mark.parametrize(
    ("name", "content", "error", "match"),
    [
        ("t.jsonl", b'{"a": 1, "b": 2}', DataError, "column 'text' expected .* are a, b"),
        ("t.csv", b"a,b\n1,2\n", DataError, "column 'text' expected .* are a, b"),
        ("t.csv", b"text,b\n1,2,3\n", DataError, "header line expected"),
        ("t.csv", b"text,text\n1,2\n", DataError, "one column .text. expected .* 2 are named so"),
        ("t.csv", b"", DataError, "it is empty"),
        ("t.jsonl", b'{"text": "a"}\n{"te', DataError, "line 2"),
        ("t.jsonl", b"[1]", DataError, "line 1 is not one"),
        ("t.jsonl", b'{"text": 3}', DataError, "int came"),
        (
            "t.jsonl",
            b'{"text": "a"}\n{"text": "so \\ud83d"}',
            DataError,
            r"column 'text' of t\.jsonl#1: character 3 is \\ud83d, one half",
        ),
        ("t.txt", b" \n\n ", DataError, "it is empty; give a file"),
        ("t.txt", b"abc\xff\xfe", DataError, r"t\.txt: byte 3 is 0xff"),
        ("t.parquet", b"PAR1", DataError, "a Parquet file expected"),
        ("t.docx", b"abc", SourceError, r"\.txt.* expected: t\.docx came"),
    ],
)
def test_files_that_cannot_be_read_say_why(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=match):
        read_documents(tmp_path / name)


def test_missing_places_say_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is none"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(SourceError, match=r"files ending in .*\.txt"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"m": [], "y": "1"}, "a list of messages expected"),
        ({"m": [{"from": "human", "value": "hi"}], "y": "1"}, "from, value came"),
        ({"m": "[not json", "y": "1"}, "JSON expected"),
        (
            {"m": [{"role": "user", "content": "\udc00"}], "y": "1"},
            r"'m' of t\.jsonl#0: character 0",
        ),
        ({"m": json.dumps([{"role": "\ud83d", "content": "a"}]), "y": "1"}, "whole characters"),
        ({"m": [{"role": "user", "content": "hi"}], "y": "\ud83d"}, "whole .* column 'y'"),
        ({"m": [{"role": "user", "content": "hi"}], "y": None}, "class name or number .* None"),
    ],
)
def test_wrong_values_say_where(tmp_path: Path, row: dict[str, object], match: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=match):
        read_documents(tmp_path / "t.jsonl", messages_column="m", label_column="y")


KEPT = "a" * 40


class TestHub:
    """The hub's dataset library is real; the network is not."""

    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        features = datasets.Features(
            {"body": datasets.Value("string"), "y": datasets.ClassLabel(names=["bad", "good"])}
        )
        rows = {"body": ["one", "two"], "y": [1, 0]}
        dataset = datasets.Dataset.from_dict(rows, features=features)

        def load(path: str, name: str | None, *, revision: str | None) -> object:
            match path:
                case "there/is":
                    return SimpleNamespace(
                        repo_id=path,
                        hash=KEPT,
                        download_and_prepare=lambda: None,
                        as_dataset=lambda split: dataset,
                    )
                case "no/network":
                    raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")
                case _:
                    raise datasets.exceptions.DatasetNotFoundError("doesn't exist\nor so")

        monkeypatch.setattr(datasets, "load_dataset_builder", load)

    def test_class_numbers_become_names(self, loaded: None) -> None:
        documents = read_hub("there/is", columns=Columns(text="body", label="y"))
        assert [(d.text, d.label) for d in documents] == [("one", "good"), ("two", "bad")]

    @pytest.mark.parametrize(
        ("repo", "error", "match"),
        [
            ("there/is", DataError, "column 'text' expected in there/is: the columns are body, y"),
            ("no/network", SourceError, "OfflineModeIsEnabled.*unset HF_HUB_OFFLINE"),
            ("not/there", SourceError, r"dataset not/there expected .*doesn't exist; check"),
        ],
    )
    def test_errors_say_what_to_do(
        self, loaded: None, repo: str, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            read_hub(repo)

    def test_another_commit_than_the_pinned_one_is_refused(self, loaded: None) -> None:
        columns = Columns(text="body")
        assert read_hub("there/is", revision=KEPT, columns=columns)
        assert read_hub("there/is", revision="main", columns=columns)
        with pytest.raises(SourceError, match="at commit bbbbbbbbbbbb, aaaaaaaaaaaa came"):
            read_hub("there/is", revision="b" * 40, columns=columns)

    @pytest.mark.parametrize("revision", [None, "b" * 40])
    def test_the_working_directory_is_no_dataset(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
    ) -> None:
        (tmp_path / "secret.txt").write_text("a secret of the worker")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SourceError, match="'text' is none: datasets has a loader"):
            read_hub("text", revision=revision)
