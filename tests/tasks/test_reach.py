"""A recipe that comes through the server reads what the operator has listed, and nothing else."""

from pathlib import Path

import pytest

from stillroom.config import Model, Text
from stillroom.errors import SourceError
from tasks.reach import require_within_reach
from tasks.settings import Settings


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """Two folders that are listed, with a text in each, and one that is not."""
    for name in ("one", "two", "two-and-more"):
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / "a.txt").write_text("text")
    return tmp_path


@pytest.fixture
def settings(roots: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(roots)
    return Settings(
        data_roots=f"{roots / 'one'}:{roots / 'two'}",
        s3_sources="s3://bucket/texts s3://models/",
    )


@pytest.mark.parametrize(
    "reference",
    [
        "{roots}/one/texts/a.txt",
        "{roots}/two/texts",
        "./two",
        "one/../two/texts/a.txt",
        "s3://bucket/texts",
        "s3://bucket/texts/2026/a.jsonl",
        "s3://models/teacher",
        "builtin:smollm2",
        "owner/name",
        "models:/name@champion",
    ],
)
def test_within_reach(reference: str, roots: Path, settings: Settings) -> None:
    require_within_reach(Text(source=reference.format(roots=roots)), settings)


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/passwd",
        "~",
        "{roots}",
        "{roots}/two-and-more/texts/a.txt",
        "./one/../two-and-more/texts/a.txt",
        "./one/not/../../../two-and-more",
        "two-and-more/texts",
    ],
)
def test_a_path_out_of_the_roots(reference: str, roots: Path, settings: Settings) -> None:
    with pytest.raises(SourceError, match="set STILLROOM_DATA_ROOTS where the worker"):
        require_within_reach(Text(source=reference.format(roots=roots)), settings)


@pytest.mark.parametrize("target", ["/etc", "/etc/passwd", "../two-and-more", "link", "a.txt"])
@pytest.mark.parametrize("asked", ["one/texts/link", "one/texts", "one"])
def test_a_link_out_of_the_roots(asked: str, target: str, roots: Path, settings: Settings) -> None:
    link = roots / "one" / "texts" / "link"
    link.symlink_to(target if target != "../two-and-more" else roots / "two-and-more")
    if target == "a.txt":  # which lies beside it
        require_within_reach(Text(source=f"./{asked}"), settings)
        return
    with pytest.raises(SourceError, match="links followed"):
        require_within_reach(Text(source=f"./{asked}"), settings)


@pytest.mark.parametrize(
    "reference", ["s3://bucket", "s3://bucket/texts-2/a", "s3://other/texts", "s3://models-2/a"]
)
def test_an_object_out_of_the_list(reference: str, settings: Settings) -> None:
    with pytest.raises(SourceError, match="set STILLROOM_S3_SOURCES where the worker"):
        require_within_reach(Text(source=reference), settings)


def test_nothing_is_listed_until_someone_lists_it(roots: Path) -> None:
    for reference in (str(roots / "one"), "s3://bucket/texts", "/"):
        with pytest.raises(SourceError, match="below no place alone"):
            require_within_reach(Text(source=reference), Settings(data_roots="", s3_sources=""))


def test_the_code_of_a_model_runs_only_where_the_operator_lets_it(roots: Path) -> None:
    model = Model(source="owner/name", trust_remote_code=True)
    with pytest.raises(SourceError, match="STILLROOM_ALLOW_REMOTE_CODE=true where the worker"):
        require_within_reach(model, Settings())
    require_within_reach(model, Settings(allow_remote_code=True))
    require_within_reach(Model(source="owner/name"), Settings())
