"""What a change of a tiny recipe does to its plan, and what planning needs no network for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.plan import PlannedStage, plan, print_plan
from stillroom.config import load_recipe, validate
from tasks.store.store import open_store
from tests.flows.house import RECIPE
from tests.flows.terminal import ROOT

FOLLOWS_QUANTIZATION = {"quantize", "evaluate quantized student"}
LAW = {
    "name": "law",
    "data": {"train": {"source": "text.jsonl"}, "sequence_length": 16},
    "training": {"steps": 4},
}


@pytest.fixture
def place(parts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory with the teacher and the text, and a place for an empty store."""
    monkeypatch.chdir(parts)
    return tmp_path / "store"


def planned(
    store: Path, *changes: dict[str, Any], without: Sequence[str] = ()
) -> list[PlannedStage]:
    recipe: dict[str, Any] = {k: v for k, v in RECIPE.items() if k not in without}
    for change in changes:
        recipe = merged(recipe, change)
    return plan(validate(recipe, "test"), open_store(str(store)))


def merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for name, value in change.items():
        old = result.get(name)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def keys(stages: list[PlannedStage]) -> dict[str, str]:
    return {stage.order.title: stage.key for stage in stages}


def changed(store: Path, change: dict[str, Any]) -> set[str]:
    before, after = keys(planned(store)), keys(planned(store, change))
    assert before.keys() == after.keys()
    return {title for title in before if before[title] != after[title]}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"quantization": {"group_size": 64}}, FOLLOWS_QUANTIZATION),
        (
            {"distillation": {"soft_weight": 0.5}},
            FOLLOWS_QUANTIZATION | {"distil student", "evaluate student"},
        ),
        (
            {"distillation": {"cache": {"draws": 4}}},
            FOLLOWS_QUANTIZATION | {"cache teacher", "distil student", "evaluate student"},
        ),
        (
            {"evaluation": {"repeats": 3}},
            {"evaluate teacher", "evaluate student", "evaluate quantized student"},
        ),
    ],
    ids=["group", "weight", "cache", "evaluation"],
)
def test_a_change_redoes_what_follows_it(
    place: Path, change: dict[str, Any], stages: set[str]
) -> None:
    assert changed(place, change) == stages


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"publish": {"name": "other", "alias": "challenger"}},
        {"teacher": {"source": "./teacher"}},
    ],
    ids=["name", "publish", "spelling of the path"],
)
def test_what_makes_no_difference_changes_no_key(place: Path, change: dict[str, Any]) -> None:
    assert changed(place, change) == set()


def test_fewer_words_come_before_everything_that_has_words(place: Path) -> None:
    before, after = keys(planned(place)), keys(planned(place, {"teacher": {"vocabulary": {}}}))
    titles = list(after)
    assert after.keys() - before.keys() == {"trim vocabulary"}
    assert titles.index("trim vocabulary") == titles.index("import teacher") + 1
    same = {title for title in before if before[title] == after[title]}
    assert same == {"import teacher"}


def test_early_stopping_has_the_teacher_asked_about_held_out_rows_too(place: Path) -> None:
    patient = {"distillation": {"training": {"early_stopping_patience": 2}}}
    before, after = keys(planned(place)), keys(planned(place, patient))
    assert after.keys() - before.keys() == {"cache teacher, held-out rows"}
    assert after["cache teacher"] == before["cache teacher"]


@pytest.mark.parametrize(
    "change",
    [
        {"execution": {"training_processes": 2}},
        {"execution": {"parallel": "fsdp"}},
        {"distillation": {"training": {"gradient_checkpointing": True}}},
    ],
    ids=["processes", "fsdp", "recomputing"],
)
def test_how_a_student_is_trained_changes_no_key(place: Path, change: dict[str, Any]) -> None:
    dealt = {"distillation": {"training": {"gradient_accumulation": 2}}}
    assert keys(planned(place, dealt, change)) == keys(planned(place, dealt))


def test_workers_measure_speeds_of_their_own(place: Path) -> None:
    workers = {"execution": {"over": "workers"}}
    measured = {"evaluate teacher", "evaluate student", "evaluate quantized student"}
    assert changed(place, workers) == measured
    others = {"execution": {"over": "workers", "deployment": "make-stage/big"}}
    before, after = keys(planned(place, workers)), keys(planned(place, others))
    assert {title for title in before if before[title] != after[title]} == measured


@pytest.mark.parametrize(
    ("approval", "said"),
    [(False, "and move the alias champion"), (True, "and ask for an approval before the alias")],
)
def test_the_plan_says_whether_somebody_is_asked(place: Path, approval: bool, said: str) -> None:
    publish = {"publish": {"name": "tiny", "alias": "champion", "approval": approval}}
    recipe = validate(merged(RECIPE, publish), "test")
    assert said in "\n".join(print_plan(recipe, plan(recipe, open_store(str(place)))))


def test_the_plan_says_what_workers_make(place: Path) -> None:
    recipe = validate(merged(RECIPE, {"execution": {"over": "workers"}}), "test")
    lines = list(print_plan(recipe, plan(recipe, open_store(str(place)))))
    (line,) = [line for line in lines if line.startswith("on workers of make-stage/make-stage: ")]
    sent = line.partition(": ")[2].split(", ")
    assert sent == [
        "cache teacher",
        "distil student",
        "quantize",
        *(f"evaluate {model}" for model in ("teacher", "student", "quantized student")),
    ]


def test_another_text_at_the_same_place_is_noticed(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    source = {"data": {"train": {"source": str(text)}}}
    text.write_text('{"text": "a"}\n')
    before = keys(planned(place, source))
    text.write_text('{"text": "b"}\n')
    after = keys(planned(place, source))
    same = {title for title in before if before[title] == after[title]}
    assert same == {"import teacher"}


def test_models_may_be_measured_and_nothing_else(place: Path) -> None:
    titles = list(keys(planned(place, without=("distillation", "quantization"))))
    assert titles == ["import teacher", "prepare data", "evaluate teacher"]


def test_an_adapter_changes_nothing_of_the_base(place: Path) -> None:
    base, both = keys(planned(place)), keys(planned(place, {"adapters": [LAW]}))
    assert base.items() < both.items()


def test_a_stage_waits_only_for_what_it_takes(place: Path) -> None:
    stages = {stage.order.title: set(stage.takes) for stage in planned(place)}
    assert stages["import teacher"] == set()
    assert stages["distil student"] == {"import teacher", "prepare data", "cache teacher"}
    assert stages["quantize"] == {"distil student", "prepare data"}


def test_a_pinned_hub_recipe_is_estimated_without_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe(ROOT / "deployments" / "recipes" / "hub.yaml")
    stages = {s.order.title: s for s in plan(recipe, open_store(str(tmp_path)))}
    # 1.1e9 parameters of 4 bytes, and a forward pass of 2 operations for each of 2e7 tokens.
    assert stages["cache teacher"].estimate.memory_bytes > 4.4e9
    assert stages["cache teacher"].estimate.seconds > 3600
    assert stages["evaluate teacher"].resolved


def test_an_unpinned_hub_source_is_left_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = {"data": {"train": {"source": "no-one/nothing"}}}
    recipe = validate(merged(RECIPE, text), "test")
    stages = plan(recipe, open_store(str(place)))
    lines = list(print_plan(recipe, stages))
    assert [stage.order.title for stage in stages if stage.resolved] == ["import teacher"]
    assert "source open" not in lines[1]
    assert all("source open" in line for line in lines[2 : len(stages) + 1])
    assert not any("cached" in line for line in lines)
