"""Recipes are ordered by name: a name leads to one folder, and to nothing else."""

from pathlib import Path

import pytest

from stillroom.errors import RecipeError
from tasks.named import load_named, recipe_names
from tasks.settings import Settings
from tests.flows.terminal import ROOT

TINY = "name: tiny\nteacher: {source: builtin:minilm}\ndata: {train: {source: builtin:python-docs}}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two recipes, and others around it."""
    for name in ("recipes/one", "recipes/two_b-3", "recipes/below/three", "outside"):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TINY)
    (tmp_path / "recipes" / "notes.txt").write_text("no recipe")
    (tmp_path / "recipes" / ".hidden.yaml").write_text(TINY)
    return tmp_path / "recipes"


def test_the_files_of_a_folder_are_its_recipes(folder: Path) -> None:
    assert recipe_names(folder) == ["one", "two_b-3"]
    assert load_named("two_b-3", folder).name == "tiny"
    assert load_named("one", folder, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    "name",
    [
        *("../outside", "below/three", "/etc/passwd", "one.yaml", "one/../../outside"),
        *("", ".", "..", ".hidden", "one\n", "one\0", "ONE", "*", "~"),
    ],
)
def test_a_name_that_is_none_of_them(folder: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"expected one of one, two_b-3, which are the files"):
        load_named(name, folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set STILLROOM_RECIPES where the worker is started"):
        recipe_names(tmp_path / "none")


def test_a_change_that_the_recipe_does_not_take(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"one\.yaml: seed: .* -1 came"):
        load_named("one", folder, ["seed=-1"])


def test_the_shipped_recipes_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STILLROOM_RECIPES", raising=False)
    folder = Settings().recipes
    assert folder == ROOT / "deployments" / "recipes"
    names = recipe_names(folder)
    assert {"demo", "encoder", "masked"} <= set(names)
    assert [load_named(name, folder).name for name in names]
