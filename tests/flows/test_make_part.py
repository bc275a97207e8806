"""Each part alone: what it takes and nothing after it, under the keys of the whole road."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from flows.part import MADE_BY, PARTS, Part
from flows.plan import plan, print_plan
from stillroom.config import validate
from stillroom.errors import RecipeError
from tasks.stages import FIT_DIMENSION, RUN_TRIAL, STAGES
from tasks.store.store import open_store
from tests.flows.house import small_recipe
from tests.flows.terminal import Terminal, assert_done, assert_refused

Recipe = dict[str, Any]
LEARNED = ["import teacher", "prepare data", "cache teacher", "distil student"]
ADAPTED = [*LEARNED, "quantize", "prepare data law", "train adapter law"]


@pytest.fixture
def whole(recipe: Recipe, parts: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe with every part."""
    monkeypatch.chdir(parts)
    return small_recipe(recipe, parts) | {"controls": ["cross_entropy", "round_to_nearest"]}


def keys(recipe: Recipe, store: Path, until: Part | None = None) -> dict[str, str]:
    stages = plan(validate(recipe, "test"), open_store(str(store)), until)
    return {stage.order.title: stage.key for stage in stages}


def test_every_stage_of_the_road_belongs_to_a_part() -> None:
    assert {stage for part in MADE_BY.values() for stage in part} == {*STAGES} - {
        RUN_TRIAL,
        FIT_DIMENSION,
    }
    assert tuple(MADE_BY) == PARTS == get_args(Part)


@pytest.mark.parametrize(
    ("part", "titles"),
    [
        ("teacher", LEARNED[:1]),
        ("data", [*LEARNED[:2], "prepare data law"]),
        ("teacher_cache", LEARNED[:3]),
        ("student", LEARNED),
        ("quantized", [*LEARNED, "quantize"]),
        ("adapters", ADAPTED),
    ],
)
def test_a_part_is_what_it_takes_under_the_same_keys(
    whole: Recipe, tmp_path: Path, part: Part, titles: list[str]
) -> None:
    all_keys, some = keys(whole, tmp_path), keys(whole, tmp_path, part)
    assert list(some) == titles
    assert some.items() <= all_keys.items()


def test_the_evaluation_takes_everything(whole: Recipe, tmp_path: Path) -> None:
    assert keys(whole, tmp_path, "evaluation") == keys(whole, tmp_path)


def test_what_a_recipe_makes_no_part_of(whole: Recipe, tmp_path: Path) -> None:
    del whole["distillation"], whole["controls"]
    with pytest.raises(RecipeError, match="makes no teacher cache: take one of teacher, data, qua"):
        keys(whole, tmp_path, "teacher_cache")


def test_the_plan_of_a_part_registers_nothing(whole: Recipe, tmp_path: Path) -> None:
    recipe = validate(whole, "test")
    stages = plan(recipe, open_store(str(tmp_path)), "data")
    lines = "\n".join(print_plan(recipe, stages, "data"))
    assert "3 of 3 stages to do" in lines
    assert "register" not in lines
    assert "quantize" not in lines


def test_the_plan_of_a_part_names_what_workers_make_of_it(whole: Recipe, tmp_path: Path) -> None:
    whole["execution"] |= {"over": "workers", "device": "cpu"}
    recipe = validate(whole, "test")
    for part, named in (("data", False), ("student", True)):
        stages = plan(recipe, open_store(str(tmp_path)), part)
        lines = "\n".join(print_plan(recipe, stages, part))
        assert ("on workers of" in lines) is named


def test_a_part_for_workers_needs_a_server(whole: Recipe, tmp_path: Path) -> None:
    whole["execution"] |= {"over": "workers"}
    user = Terminal(tmp_path, {"STILLROOM_HOME": str(tmp_path / "home")})
    user.write(whole)
    done = user.compress("--until", "student")
    assert_refused(done, "execution.over: workers needs a Prefect server")


@pytest.mark.integration
def test_parts_are_cached_in_the_whole(terminal: Callable[[], Terminal], recipe: Recipe) -> None:
    user = terminal()
    user.write({name: part for name, part in recipe.items() if name != "distillation"})
    done = user.compress("--until", "data")
    assert_done(done)
    assert "all that data takes is made: 2 of 2 stages now" in done.stdout

    done = user.compress("--until", "quantized")
    assert_done(done, ("import teacher", "prepare data"))
    assert "1 of 3 stages now" in done.stdout
    assert [record.kind for record in user.records("evaluation")] == []
    assert user.versions() == 0
    assert_done(user.compress(), ("import teacher", "prepare data", "quantize"))
    assert user.versions() == 1
