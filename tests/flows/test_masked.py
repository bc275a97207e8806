"""The road of a masked language model: from a bare encoder to what is measured and registered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.plan import plan
from stillroom.config import load_recipe
from tasks.store.store import open_store
from tests.flows.terminal import Terminal, assert_done, assert_refused

RECIPE: dict[str, Any] = {
    "name": "tiny-masked",
    "task": "masked_lm",
    "teacher": {"source": "encoder", "fine_tune": {"steps": 20, "batch_rows": 4}},
    "data": {
        "train": {"source": "text.jsonl"},
        "sequence_length": 32,
        "max_train_tokens": 8192,
        "max_evaluation_tokens": 2048,
        "calibration_rows": 16,
    },
    "distillation": {
        "student": {"layers": 2},
        "cache": {"rows_per_shard": 64},
        "training": {"steps": 10, "batch_rows": 4},
    },
    "quantization": {"bits": 4, "group_size": 32},
    "evaluation": {"prefill_tokens": 8, "repeats": 2},
    "gates": {"max_perplexity_ratio": 10, "min_accuracy_ratio": 0},
    "publish": {"name": "tiny-masked"},
    "execution": {"threads": 1},
}
ADAPTER = {
    "name": "law",
    "rank": 2,
    "data": {
        "train": {"source": "text.jsonl"},
        "sequence_length": 16,
        "max_train_tokens": 512,
        "calibration_rows": 1,
    },
    "training": {"steps": 4, "batch_rows": 4},
}


FIRST = ("name", "task", "teacher", "data", "evaluation", "execution")


def bare_encoder(folder: Path) -> None:
    """Write an encoder without a head, as sentence encoders come."""
    from stillroom.models import save_model
    from tests.stillroom.tiny import tiny_bert_masked, tiny_masked_tokenizer

    model = tiny_bert_masked(layers=4, hidden=64, vocab=60).bert
    save_model(model, tiny_masked_tokenizer(), folder)


@pytest.mark.integration
def test_a_bare_encoder_becomes_a_small_masked_model(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    from stillroom.data.prepare import load_prepared
    from stillroom.evaluation.quality import measure_quality
    from stillroom.models import load_model

    opened = terminal()
    bare_encoder(opened.folder / "encoder")
    # In portions, as each command has a time to end in.
    opened.write({name: RECIPE[name] for name in RECIPE if name in FIRST})
    assert_done(opened.compress())
    opened.write(RECIPE)
    done = opened.compress()
    assert_done(done, cached=("tune teacher", "evaluate teacher"))
    assert "Pseudo-perplexity" in done.stdout
    report = opened.home / "reports" / "tiny-masked" / "report.json"
    road = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in road] == ["teacher", "student", "quantized student"]

    # The figures are those of the models and the rows that the store holds.
    models = {
        "quantized" if "bits" in record.section else "student": record
        for record in opened.records("model")
        if "bits" in record.section or "student" in record.section
    }
    teacher_key = models["student"].inputs["teacher"]
    models["teacher"] = next(r for r in opened.records("model") if r.key == teacher_key)
    assert "training" in models["teacher"].section, "the head was trained first"
    teacher, final = (
        load_model(opened.store.fetch(models[name], tmp_path / "fetched" / name), task="masked_lm")
        for name in ("teacher", "quantized")
    )
    (dataset,) = opened.records("dataset")
    rows = load_prepared(opened.store.fetch(dataset, tmp_path / "fetched" / "rows")).evaluation
    expected = measure_quality(final, teacher, rows, task="masked_lm")
    quality = road[-1]["quality"]
    assert sum(quality["counts"]) == int((rows.labels != -100).sum())
    for name in ("nats", "kl_nats"):
        assert sum(quality[name]) == pytest.approx(sum(getattr(expected, name)), rel=1e-3)


@pytest.mark.integration
def test_an_adapter_of_a_masked_model_is_measured_and_registered(
    terminal: Callable[..., Terminal],
) -> None:
    from stillroom.models import save_model
    from tests.stillroom.tiny import tiny_bert_masked, tiny_masked_tokenizer

    opened = terminal()
    model = tiny_bert_masked(hidden=64, vocab=60)
    save_model(model, tiny_masked_tokenizer(), opened.folder / "encoder")
    left_out = ("distillation", "quantization")
    recipe = {name: section for name, section in RECIPE.items() if name not in left_out}
    opened.write(recipe | {"teacher": {"source": "encoder"}, "adapters": [ADAPTER]})
    assert_done(opened.compress())
    assert opened.versions() == 2  # the model and its adapter
    report = opened.home / "reports" / "tiny-masked" / "report.json"
    names = [row["name"] for row in json.loads(report.read_text())["rows"]]
    assert names == ["teacher", "teacher", "teacher + law"]


@pytest.mark.integration
def test_a_bare_encoder_without_training_is_refused(terminal: Callable[..., Terminal]) -> None:
    opened = terminal()
    bare_encoder(opened.folder / "encoder")
    opened.write(RECIPE | {"teacher": {"source": "encoder"}})
    assert_refused(opened.compress(), "BertModel", "set teacher.fine_tune")


def test_only_masked_recipes_hang_on_how_many_words_are_hidden(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def keys(name: str, *changes: str) -> dict[str, str]:
        recipe = load_recipe(Path(f"deployments/recipes/{name}.yaml"), changes)
        return {line.order.title: line.key for line in plan(recipe, store)}

    before, after = keys("masked"), keys("masked", "data.masked_fraction=0.3")
    changed = {title for title in before if before[title] != after[title]}
    assert changed == before.keys() - {"import teacher", "trim vocabulary"}
    for line in plan(load_recipe(Path("deployments/recipes/encoder.yaml")), store):
        assert "masked_fraction" not in line.order.section, line.order.title
