"""A teacher that names classes: its own order is that of the rows, and others are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.config import Distillation, Evaluation, Quantization
from stillroom.data.prepare import load_prepared
from stillroom.errors import MismatchError, SourceError
from stillroom.models import save_model
from tasks.cache_worker import plan_capture
from tasks.sources import resolve_text
from tasks.stages import (
    CACHE_TEACHER,
    EVALUATE_MODEL,
    PREPARE_DATA,
    QUANTIZE_MODEL,
    Order,
    Stage,
    as_json,
)
from tasks.work import evaluate_model, prepare_data, quantize_model
from tasks.work.bench import Bench
from tests.stillroom.tiny import tiny_bert_classifier, tiny_masked_tokenizer
from tests.tasks.benches import new_bench

TEXT = {
    "format": "auto",
    "config": None,
    "split": "train",
    "text_column": "text",
    "label_column": "label",
    "messages_column": None,
}
CLASSIFY = {"task": "sequence_classification"}


def teacher(folder: Path, *names: str) -> Path:
    tokenizer = tiny_masked_tokenizer()
    model = tiny_bert_classifier(vocab=len(tokenizer), labels=len(names))
    model.config.id2label = dict(enumerate(names))
    save_model(model, tokenizer, folder)
    return folder


def bench_of(stage: Stage, section: dict[str, Any], place: Path, inputs: dict[str, Path]) -> Bench:
    bench = new_bench(stage, section, place, inputs)
    order = bench.order.model_copy(update={"section": bench.order.section | CLASSIFY})
    return replace(bench, order=order)


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    labels = ("World", "Business")
    lines = [
        json.dumps({"text": f"{'abcdefghij'[i]} " * 12, "label": labels[i % 2]}) for i in range(10)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))

    def prepared(teacher: Path) -> Path:
        section = {"train": TEXT, "sequence_length": 16, "calibration_rows": 2}
        place = teacher / "rows"
        place.mkdir()
        bench = bench_of(PREPARE_DATA, section, place, {"teacher": teacher})
        source = resolve_text(str(tmp_path / "train.jsonl"), None)
        order = bench.order.model_copy(update={"sources": {"train": source}})
        prepare_data.work(replace(bench, order=order))
        return bench.output

    return prepared


def ordered_cache(inputs: dict[str, Path]) -> Order:
    section = as_json(Distillation.model_validate({}).cache) | {"temperature": 1.0} | CLASSIFY
    keys = {role: role[0] * 64 for role in inputs}
    return Order(title="cache", stage=CACHE_TEACHER, section=section, seed=0, inputs=keys)


def test_the_rows_have_the_teachers_order(tmp_path: Path, rows: Any) -> None:
    folder = teacher(tmp_path / "teacher", "World", "Business")
    inputs = {"teacher": folder, "data": rows(folder)}
    assert load_prepared(inputs["data"]).train.label_names == ("World", "Business")
    assert len(plan_capture(ordered_cache(inputs), inputs).examples) == 9


def test_a_teacher_of_other_classes_makes_no_cache(tmp_path: Path, rows: Any) -> None:
    folder = teacher(tmp_path / "teacher", "good", "bad")
    inputs = {"teacher": folder, "data": rows(folder)}
    with pytest.raises(
        MismatchError, match=r"2 classes in their order, good, bad; 2 came, Business, World"
    ):
        plan_capture(ordered_cache(inputs), inputs)


@pytest.fixture
def bare(tmp_path: Path, rows: Any) -> dict[str, Path]:
    """A teacher without a head, and rows of two classes."""
    tokenizer = tiny_masked_tokenizer()
    save_model(tiny_bert_classifier(vocab=len(tokenizer)).bert, tokenizer, tmp_path / "teacher")
    return {"teacher": tmp_path / "teacher", "data": rows(tmp_path / "teacher")}


NO_HEAD = r"holds a BertModel, .* set teacher\.fine_tune"


def test_a_teacher_without_a_head_makes_no_cache(bare: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match=NO_HEAD):
        plan_capture(ordered_cache(bare), bare)


def test_a_model_without_a_head_is_neither_quantized_nor_measured(
    tmp_path: Path, bare: dict[str, Path]
) -> None:
    inputs = {"base": bare["teacher"], "data": bare["data"]}
    (tmp_path / "quantized").mkdir()
    section = as_json(Quantization(group_size=32))
    with pytest.raises(SourceError, match=NO_HEAD):
        quantize_model.work(bench_of(QUANTIZE_MODEL, section, tmp_path / "quantized", inputs))
    (tmp_path / "measured").mkdir()
    inputs = bare | {"model": bare["teacher"]}
    with pytest.raises(SourceError, match=NO_HEAD):
        evaluate_model.work(
            bench_of(EVALUATE_MODEL, as_json(Evaluation()), tmp_path / "measured", inputs)
        )


def test_a_model_of_the_classes_in_another_order_is_not_measured(tmp_path: Path, rows: Any) -> None:
    data = rows(teacher(tmp_path / "teacher", "World", "Business"))
    other = teacher(tmp_path / "other", "Business", "World")
    inputs = {"model": other, "teacher": other, "data": data}
    (tmp_path / "measured").mkdir()
    bench = bench_of(EVALUATE_MODEL, as_json(Evaluation()), tmp_path / "measured", inputs)
    with pytest.raises(MismatchError, match=r"order, Business, World; 2 came, World, Business"):
        evaluate_model.work(bench)
