import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.errors import SourceError
from tasks.registry import champion, move_alias, register_base
from tasks.sources import Source, fetch_folder, hub_commit, place_of, resolve_model, resolve_text
from tests.registering import Place, llama_folder, register_pair
from tests.servers import S3Server

COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"


@pytest.mark.parametrize(
    ("reference", "place"),
    [
        ("builtin:smollm2", "builtin"),
        ("s3://bucket/prefix", "s3"),
        ("models:/name@champion", "registry"),
        ("./not/there", "local"),
        ("owner/name", "hub"),
        ("gpt2", "hub"),
    ],
)
def test_the_form_of_a_reference_says_where_it_is(reference: str, place: str) -> None:
    assert place_of(reference) == place


def test_a_reference_of_no_form_is_refused() -> None:
    with pytest.raises(SourceError, match="expected builtin:NAME, a local path, a hub id"):
        place_of("a b c")


def test_a_text_counts_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("same")
    other.write_text("same")
    before = resolve_text(str(one), None).identity
    assert before == resolve_text(str(other), None).identity
    one.write_text("changed")
    assert resolve_text(str(one), None).identity != before


def test_a_text_counts_by_its_ending_too(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    for file in (text, lines):
        file.write_text('{"text": "a row, or a line of text"}\n')
    assert resolve_text(str(text), None).identity != resolve_text(str(lines), None).identity


def test_a_folder_counts_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    before = resolve_text(str(tmp_path), None).identity
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert resolve_text(str(tmp_path), None).identity != before


def test_a_name_in_another_encoding_counts_too(tmp_path: Path) -> None:
    before = resolve_text(str(tmp_path), None).identity
    Path(os.fsdecode(bytes(tmp_path) + b"/\xe9t\xe9.txt")).write_text("x")
    assert resolve_text(str(tmp_path), None).identity != before


def test_a_source_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")
    source = resolve_text(str(file), None)
    assert fetch_folder(source, tmp_path / "out") == file
    file.write_text("y")
    with pytest.raises(SourceError, match="has changed while the flow ran"):
        fetch_folder(source, tmp_path / "out")


def test_an_alias_that_moves_under_way_is_noticed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = register_pair(place)
    move_alias(place.client, base, "champion", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    source = resolve_model("models:/tiny@champion", None)
    other = register_base(
        place.client, place.candidate("tiny", llama_folder(place.root, seed=1), "c" * 64)
    )
    move_alias(place.client, other, "champion", champion(place.client, "tiny", "champion"))
    with pytest.raises(SourceError, match="has changed while the flow ran"):
        fetch_folder(source, place.root / "fetched")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("builtin:gpt5", "expected one of builtin:smollm2, builtin:minilm"),
        ("./nowhere", "holds no model: expected a folder with config.json"),
    ],
)
def test_a_missing_model_says_what_was_expected(reference: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        resolve_model(reference, None)


def test_a_model_is_no_text() -> None:
    with pytest.raises(SourceError, match="is a model; a text is expected here"):
        resolve_text("models:/name@champion", None)


def test_a_pinned_commit_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_commit("Salesforce/wikitext", COMMIT, "dataset") == COMMIT


@pytest.fixture
def bucket(mock_s3: S3Server, s3_environment: Callable[[S3Server], None]) -> str:
    from tasks.store.s3_client import s3_client

    s3_environment(mock_s3)
    name = f"texts-{uuid.uuid4().hex[:8]}"
    s3_client().create_bucket(Bucket=name)
    return name


def test_a_text_on_s3_resolves_and_arrives(bucket: str, tmp_path: Path) -> None:
    from tasks.store.s3_client import s3_client

    client = s3_client()
    for name in ("corpus/a.txt", "corpus/deep/b.txt", "corpus-of-another/c.txt"):
        client.put_object(Bucket=bucket, Key=name, Body=name.encode())
    source = resolve_text(f"s3://{bucket}/corpus", None)
    folder = fetch_folder(source, tmp_path / "folder")
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.txt")}
    assert found == {"a.txt": "corpus/a.txt", "deep/b.txt": "corpus/deep/b.txt"}

    single = resolve_text(f"s3://{bucket}/corpus/a.txt", None)
    assert fetch_folder(single, tmp_path / "single").read_text() == "corpus/a.txt"

    client.put_object(Bucket=bucket, Key="corpus/a.txt", Body=b"new")
    assert resolve_text(f"s3://{bucket}/corpus", None).identity != source.identity


def test_a_text_on_s3_that_goes_under_way_is_named(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.sources._s3_objects", lambda _: [("corpus/a.txt", 1, "etag")])
    source = Source(f"s3://{bucket}/corpus", "s3", "identity")
    with pytest.raises(SourceError, match=r"corpus/a\.txt cannot be read: An error occurred"):
        fetch_folder(source, tmp_path / "folder")


def test_what_s3_shows_as_a_folder_is_no_text(bucket: str, tmp_path: Path) -> None:
    from tasks.store.s3_client import s3_client

    for name, content in (("c/", b""), ("c/2025/", b""), ("c/2025/a.txt", b"text")):
        s3_client().put_object(Bucket=bucket, Key=name, Body=content)
    folder = fetch_folder(resolve_text(f"s3://{bucket}/c/", None), tmp_path / "folder")
    assert [file for file in folder.rglob("*") if file.is_file()] == [folder / "2025" / "a.txt"]


def test_an_object_stays_in_the_folder_that_it_is_fetched_into(bucket: str, tmp_path: Path) -> None:
    from tasks.store.s3_client import s3_client

    s3_client().put_object(Bucket=bucket, Key="c/../../outside.txt", Body=b"text")
    source = resolve_text(f"s3://{bucket}/c", None)
    with pytest.raises(SourceError, match="its name leads out of the folder"):
        fetch_folder(source, tmp_path / "one" / "two")
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_missing_text_on_s3_says_so(bucket: str) -> None:
    with pytest.raises(SourceError, match="no such object, and no objects below it"):
        resolve_text(f"s3://{bucket}/nothing", None)
    with pytest.raises(SourceError, match="cannot be read"):
        resolve_text(f"s3://{bucket}-not-there/x", None)
