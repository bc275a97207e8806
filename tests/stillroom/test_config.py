from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from stillroom.config import (
    Distillation,
    Recipe,
    distillation,
    dump_recipe,
    intrinsic_dimension,
    load_recipe,
    quantization,
    sections,
    training,
    validate,
)
from stillroom.errors import RecipeError

RECIPES = sorted(Path("deployments/recipes").glob("*.yaml"))
DEMO = Path("deployments/recipes/demo.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_a_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert validate(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_every_field_says_in_a_sentence_what_it_is() -> None:
    models = [
        value
        for module in (sections, training, distillation, quantization, intrinsic_dimension)
        for value in [*vars(module).values(), Recipe]
        if isinstance(value, type) and issubclass(value, BaseModel) and value is not BaseModel
    ]
    assert len(models) > 10
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            assert field.description.rstrip().endswith("."), f"{model.__name__}.{name}"


def test_an_adapter_is_not_called_as_what_another_is_merged_into() -> None:
    changes = ["adapters.0.name=french", "adapters.0.merge={}"]
    recipe = load_recipe(DEMO, changes).model_dump(mode="json", exclude_unset=True)
    second = {**recipe["adapters"][0], "name": "french-merged"}
    with pytest.raises(RecipeError, match="french-merged: what french is merged into is"):
        validate({**recipe, "adapters": [*recipe["adapters"], second]}, "test")
    recipe["adapters"][0].pop("merge")
    validate({**recipe, "adapters": [*recipe["adapters"], second | {"merge": None}]}, "test")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("quantization.bits=5", "quantization.bits: Input should be 2, 3, 4 or 8, 5 came"),
        ("quantization.bit=4", "quantization.bit: unknown key"),
        ("adapters.0.rank=0", "adapters.0.rank: Input should be greater than or equal to 1"),
        ("adapters.0.name=base", "adapters.base: reports call the text of `data` so"),
        ("publish.alias=latest", "latest is one that MLflow gives by itself"),
        ("publish.alias=V2", "V2 is one that MLflow gives by itself"),
        ("quantization.group_size=0", "0 is no group; use 32, 64, 128, or -1"),
        ("distillation.soft_weight=0", "soft_weight"),
        (
            "distillation.divergence=reverse_kl",
            "needs distillation.cache.kind: dense, sampled came",
        ),
        ("distillation.cosine_weight=1", "set cache.hidden_states to last"),
        ("distillation.preset=hintom", "distillation.preset: Input should be 'hinton'"),
        ("distillation.cache.draws=0", "head 2 and draws 0 came"),
        ("distillation.cache={kind: top_k, head: 0}", "head 0 and draws 16 came"),
        ("teacher.dtype=float16", "teacher.dtype: a student is trained in its teacher's numbers"),
        ("teacher.fine_tune={}", "teacher.fine_tune trains a new head"),
        ("data.masked_fraction=0.3", "for the task masked_lm, causal_lm came; leave it out"),
        ("data.masked_fraction=1", "data.masked_fraction: Input should be less than 1"),
        ("nonsense", "expected key=value"),
        ("adapters.7.rank=1", "expected 0 to 0, 7 came"),
        ("name.deeper=1", "name is a single value"),
        ("seed=[", "is not YAML"),
    ],
)
def test_a_bad_change_says_what_is_wrong(change: str, said: str) -> None:
    changes = [change, "distillation.hard_weight=0"] if "soft_weight" in change else [change]
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gate", "change", "said"),
    [
        ("max_champion_loss_nats", "publish=null", "add a publish section"),
        ("min_decode_tokens_per_second", "task=masked_lm", "causal_lm, which generates"),
    ],
)
def test_a_gate_that_nothing_can_be_judged_by_is_refused(gate: str, change: str, said: str) -> None:
    for changes in ([f"gates.{gate}=0.1"], [change]):
        load_recipe(DEMO, changes)
    with pytest.raises(RecipeError, match=f"gates.{gate}.*{said}"):
        load_recipe(DEMO, [f"gates.{gate}=0.1", change])


def test_a_float16_teacher_may_be_tuned_or_stay_as_it_is() -> None:
    load_recipe(DEMO, ["teacher.dtype=float16", "distillation=null", "controls=[]"])
    tuned = ["task=masked_lm", "teacher.fine_tune={}", "teacher.dtype=float16"]
    load_recipe(DEMO, tuned)


def test_a_change_reaches_absent_sections_and_list_items() -> None:
    recipe = load_recipe(DEMO, ["quantization.bits=3", "gates.max_kl_nats=2", "adapters.0.rank=4"])
    assert recipe.quantization is not None
    assert recipe.quantization.bits == 3
    assert recipe.gates.max_kl_nats == 2
    assert recipe.adapters[0].rank == 4


def test_a_preset_gives_the_weights_that_the_recipe_leaves_open() -> None:
    switch = Distillation(preset="switch")
    assert (switch.soft_weight, switch.hard_weight, switch.temperature) == (0.25, 0.75, 1.0)
    distilbert = Distillation(preset="distilbert")
    weights = (distilbert.soft_weight, distilbert.hard_weight, distilbert.cosine_weight)
    assert (*weights, distilbert.temperature) == (5.0, 2.0, 1.0, 2.0)
    assert distilbert.cache.hidden_states == "last"
    draws = Distillation.model_validate({"preset": "distilbert", "cache": {"draws": 12}}).cache
    assert (draws.draws, draws.hidden_states) == (12, "last")
    own = Distillation.model_validate({"preset": "hinton", "temperature": 4})
    assert (own.soft_weight, own.hard_weight, own.temperature) == (1.0, 0.0, 4.0)


@pytest.mark.parametrize(
    "change", ["quantization.engine=gptqmodel", "gates.max_champion_loss_nats=0.1"]
)
def test_a_teacher_with_code_of_its_own_is_loaded_by_us_alone(change: str) -> None:
    load_recipe(DEMO, [change])
    load_recipe(DEMO, ["teacher.trust_remote_code=true"])
    with pytest.raises(RecipeError, match=r"\(teacher\.trust_remote_code\)"):
        load_recipe(DEMO, [change, "teacher.trust_remote_code=true"])


@pytest.mark.parametrize("asked", ["max_perplexity_ratio=1.2", "damping=2"])
def test_what_the_engine_gptqmodel_would_not_heed_is_refused(asked: str) -> None:
    load_recipe(DEMO, [f"quantization.{asked}"])
    with pytest.raises(RecipeError, match="engine gptqmodel"):
        load_recipe(DEMO, [f"quantization.{asked}", "quantization.engine=gptqmodel"])


@pytest.mark.parametrize(
    ("task", "gate"),
    [("masked_lm", "max_perplexity_ratio"), ("sequence_classification", "min_accuracy_ratio")],
)
def test_perplexity_is_no_bound_where_no_next_token_is_predicted(task: str, gate: str) -> None:
    recipe = {
        "name": "bounded",
        "task": task,
        "teacher": {"source": "elsewhere"},
        "data": {"train": {"source": "text.jsonl"}},
        "quantization": {"max_perplexity_ratio": 1.2},
    }
    with pytest.raises(RecipeError, match=rf"does not; set gates\.{gate}"):
        validate(recipe, "test")


def test_a_recipe_cannot_change() -> None:
    recipe = load_recipe(DEMO)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_controls_need_what_they_control() -> None:
    with pytest.raises(RecipeError, match="round_to_nearest needs a quantization section"):
        load_recipe(Path("deployments/recipes/distil.yaml"), ["controls=[round_to_nearest]"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not there"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "list came"),
        (b"a: [", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
