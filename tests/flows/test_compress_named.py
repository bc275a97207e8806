"""What a recipe that is ordered by its name may read: what its file says, and no more."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from flows.plan import planned_keys, resolve_source, resolver
from stillroom.config import load_recipe
from stillroom.errors import SourceError

LAW = {"name": "law", "data": {"train": {"source": "text.jsonl"}, "sequence_length": 16}}


@pytest.fixture
def file(
    parts: Path, tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The operator's recipe, in a run that the server ordered; nothing is listed for others."""
    monkeypatch.chdir(parts)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "ordered")
    for name in ("STILLROOM_DATA_ROOTS", "STILLROOM_S3_SOURCES", "STILLROOM_ALLOW_REMOTE_CODE"):
        monkeypatch.delenv(name, raising=False)
    recipe["adapters"] = [LAW]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "secret.jsonl").write_text('{"text": "planted"}\n')
    return tmp_path / "own.yaml"


def keys(file: Path, *changes: str) -> list[str]:
    return planned_keys(load_recipe(file, changes), resolver(load_recipe(file)))


@pytest.mark.parametrize(
    "change",
    [
        "quantization.bits=3",
        "teacher.dtype=bfloat16",
        "teacher.vocabulary.minimum_uses=2",
        "data.max_train_tokens=64",
        "data.evaluation.source=text.jsonl",  # which it reads anyhow
        "data.train.source=builtin:python-docs",
        "adapters.0.rank=2",
    ],
)
def test_a_change_that_reads_nothing_else(file: Path, change: str) -> None:
    assert keys(file, change) != keys(file)


@pytest.mark.parametrize(
    "change",
    [
        "data.train.source={folder}/secret.jsonl",
        "data.evaluation.source={folder}/secret.jsonl",
        "data.evaluation={{source: text.jsonl, format: txt}}",
        "adapters.0.data.train.source={folder}/secret.jsonl",
        "teacher.source={folder}",
        "data.train.source=./teacher",
        "data.train.source=s3://elsewhere/texts",
        "data.train.text_column=another",
        "data.train.format=txt",
        "data.train.messages_column=another",
        "teacher.trust_remote_code=true",
    ],
)
def test_a_change_that_reads_more(file: Path, change: str) -> None:
    with pytest.raises(
        SourceError, match=r"a recipe (or a stage )?that comes through the server may"
    ):
        keys(file, change.format(folder=file.parent))


def test_the_same_recipe_without_a_name_reads_nothing(file: Path) -> None:
    recipe = load_recipe(file)
    with pytest.raises(SourceError, match="STILLROOM_DATA_ROOTS"):
        planned_keys(recipe, resolver())


def test_the_operators_own_recipe_runs_the_code_that_it_names(file: Path) -> None:
    trusting = file.with_name("trusting.yaml")
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"]["trust_remote_code"] = True
    trusting.write_text(yaml.safe_dump(recipe))
    assert keys(trusting)
    with pytest.raises(SourceError, match="trust_remote_code"):
        keys(trusting, "teacher.revision=other")


def run_of(deployment: str | None, parent: str | None) -> Any:
    return SimpleNamespace(
        flow_run=SimpleNamespace(deployment_id=deployment, parent_task_run_id=parent)
    )


@pytest.mark.parametrize(
    ("context", "asked", "ordered"),
    [
        (None, None, False),
        (None, "ordered", True),
        (run_of(None, None), "not asked", False),  # typed into a terminal
        (run_of("ordered", None), None, True),
        (run_of(None, "a task"), "ordered", True),  # within a deployment's run
        (run_of(None, "a task"), None, False),
    ],
)
def test_whether_the_server_ordered_a_run(
    context: Any, asked: str | None, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `asked` says is what Prefect's server would."""
    monkeypatch.setattr("prefect.context.FlowRunContext", SimpleNamespace(get=lambda: context))
    monkeypatch.setattr("flows.plan.cache", lambda resolve: resolve)
    if asked is None:
        monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID", raising=False)
    else:
        monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", asked)
    assert (resolver() is not resolve_source) == ordered
