"""Planning: which stages a recipe asks for, and what each one's key depends on."""

import time
from pathlib import Path

import pytest

import flows.orders
from flows.plan import PlannedStage, plan, print_plan
from stillroom.config import Recipe, load_recipe
from stillroom.errors import RecipeError, SourceError
from tasks.store.store import ArtifactStore, open_store

RECIPES = sorted(Path("deployments/recipes").glob("*.yaml"))
DEMO = Path("deployments/recipes/demo.yaml")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


def keys(store: ArtifactStore, *changes: str, path: Path = DEMO) -> dict[str, str]:
    return {line.order.title: line.key for line in plan(load_recipe(path, changes), store)}


def changed(store: ArtifactStore, *changes: str) -> set[str]:
    before, after = keys(store), keys(store, *changes)
    assert before.keys() == after.keys()
    return {title for title in before if before[title] != after[title]}


def test_other_bits_redo_quantization_and_what_follows(store: ArtifactStore) -> None:
    assert changed(store, "quantization.bits=3") == {
        "quantize",
        "evaluate quantized student",
        "train adapter python-source",
        "evaluate quantized student on python-source",
        "evaluate quantized student + python-source on python-source",
    }


def test_the_rhythm_of_checkpoints_redoes_nothing(store: ArtifactStore) -> None:
    changes = (
        "distillation.training.checkpoint_every_steps=3",
        "adapters.0.training.checkpoint_every_steps=3",
    )
    assert changed(store, *changes) == set()


def test_names_gates_and_publication_redo_nothing(store: ArtifactStore) -> None:
    assert changed(store, "name=other", "gates.max_kl_nats=1", "publish.alias=best") == set()


def test_another_seed_redoes_everything(store: ArtifactStore) -> None:
    assert changed(store, "seed=1") == keys(store).keys()


def test_another_temperature_redoes_the_cache_and_the_student(store: ArtifactStore) -> None:
    redone = changed(store, "distillation.temperature=2")
    assert {"cache teacher", "distil student", "evaluate student"} <= redone
    assert not redone & {"import teacher", "prepare data", "evaluate teacher"}


def test_another_gpu_redoes_the_measurements_alone(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(store, "execution.device=cuda")
    monkeypatch.setattr(flows.orders, "gpu_names", lambda: "another GPU")
    after = keys(store, "execution.device=cuda")
    redone = {title for title in before if before[title] != after[title]}
    assert redone == {title for title in before if title.startswith("evaluate ")}


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("quantize", ["import teacher", "prepare data", "quantize", "evaluate teacher",
                      "evaluate quantized teacher"]),
        ("distil", ["import teacher", "prepare data", "cache teacher", "distil student",
                    "evaluate teacher", "evaluate student"]),
        ("adapters", ["import teacher", "prepare data", "quantize", "evaluate teacher",
                      "evaluate quantized teacher",
                      "prepare data python-source", "train adapter python-source",
                      "merge adapter python-source",
                      "evaluate quantized teacher on python-source",
                      "evaluate quantized teacher + python-source on python-source",
                      "evaluate quantized teacher + python-source, merged on python-source",
                      # Their text is the first one's, and so is the base's figure on it.
                      *(stage
                        for name in ("bottleneck", "prefix", "prompt")
                        for stage in (
                            f"train adapter python-source-{name}",
                            f"evaluate quantized teacher + python-source-{name} "
                            f"on python-source-{name}"))]),
    ],
)  # fmt: skip
def test_absent_sections_are_left_out(recipe: str, stages: list[str], store: ArtifactStore) -> None:
    path = Path(f"deployments/recipes/{recipe}.yaml")
    assert list(keys(store, path=path)) == stages


def test_controls_share_all_that_is_not_theirs(store: ArtifactStore) -> None:
    plain = keys(store)
    controlled = keys(store, "controls=[cross_entropy, round_to_nearest]")
    assert plain.items() <= controlled.items()
    assert controlled.keys() - plain.keys() == {
        "train student without teacher",
        "evaluate student without teacher",
        "quantize, rounded to nearest",
        "evaluate rounded to nearest",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_in_moments_and_offline(
    path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe(path)
    started = time.process_time()
    lines = plan(recipe, store)
    assert time.process_time() - started < 5, "planning loads something that it does not need"
    assert all(line.resolved and not line.cached for line in lines)
    assert all(line.estimate.seconds > 0 and line.estimate.memory_bytes > 1e8 for line in lines)
    text = "\n".join(print_plan(recipe, lines))
    for line in lines:
        assert line.key[:12] in text


def test_a_source_that_cannot_be_asked_is_left_open(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.plan.resolve_source", _no_hub)
    recipe = load_recipe(Path("deployments/recipes/hub.yaml"), ["teacher.revision=main"])
    lines = plan(recipe, store)
    assert not any(line.resolved for line in lines)
    assert "source open" in "\n".join(print_plan(recipe, lines))


def _no_hub(place: object) -> object:
    raise SourceError("the hub does not answer")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("teacher.revision=main", "builtin:smollm2: revision 'main' is for a hub id"),
        ("data.train.split=validation", "builtin:python-docs: split 'validation' is for a hub id"),
        ("data.train.config=raw", "builtin:python-docs: config 'raw' is for a hub id"),
    ],
)
def test_what_is_read_of_the_hub_alone_is_refused_elsewhere(
    store: ArtifactStore, change: str, match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        plan(load_recipe(DEMO, [change]), store)


def test_a_folder_called_as_a_pinned_hub_id_is_refused(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(DEMO, ["teacher.source=owner/name", "teacher.revision=main"])
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="a file or folder of that name here"):
        plan(recipe, store)


def test_a_missing_local_source_is_an_error_even_when_planning(store: ArtifactStore) -> None:
    with pytest.raises(SourceError, match="holds no model"):
        plan(load_recipe(DEMO, ["teacher.source=./nowhere"]), store)


def test_what_is_there_is_said_to_be_cached(store: ArtifactStore, tmp_path: Path) -> None:
    recipe = load_recipe(DEMO)
    first = plan(recipe, store)[0]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("x")
    store.add(tmp_path / "made", kind=first.kind, key=first.key, inputs={}, section={},
              versions={}, stage_version=1)  # fmt: skip
    lines = plan(recipe, store)
    assert [line.cached for line in lines] == [True] + [False] * (len(lines) - 1)


def estimated(line: PlannedStage) -> tuple[float, float]:
    return line.estimate.seconds, line.estimate.memory_bytes


def test_more_text_takes_longer_and_larger_batches_more_memory(store: ArtifactStore) -> None:
    def stages(*changes: str) -> dict[str, tuple[float, float]]:
        recipe: Recipe = load_recipe(DEMO, changes)
        return {line.order.title: estimated(line) for line in plan(recipe, store)}

    base = stages()
    longer = stages("data.max_train_tokens=65536")
    assert longer["cache teacher"][0] > base["cache teacher"][0]
    larger = stages("evaluation.batch_rows=16")
    assert larger["evaluate student"][1] > base["evaluate student"][1]
