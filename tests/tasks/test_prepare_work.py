"""The stage that prepares data: rows fit the teacher's table of positions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from stillroom.errors import RecipeError
from stillroom.models import save_model
from tasks.sources import resolve_text
from tasks.stages import PREPARE_DATA
from tasks.work import prepare_data
from tests.stillroom.test_serving_lengths import tiny_roberta
from tests.stillroom.tiny import (
    seeded,
    tiny_bert_masked,
    tiny_llama,
    tiny_masked_tokenizer,
    tiny_tokenizer,
)
from tests.tasks.benches import new_bench
from tests.tasks.test_vocabulary_work import TEXT


def prepared(folder: Path, teacher: Any, task: str, length: int, **further: Any) -> dict[str, Any]:
    """Return the statistics of rows of so many letters, made for `teacher`."""
    tokenizer = tiny_tokenizer() if task == "causal_lm" else tiny_masked_tokenizer()
    save_model(teacher, tokenizer, folder / "teacher")
    rows = [{"text": letter * 200, "y": letter} for letter in "ab"]
    for role in ("train", "evaluation"):
        lines = [json.dumps(row | {"text": role + row["text"]}) + "\n" for row in rows]
        (folder / f"{role}.jsonl").write_text("".join(lines))
    text = TEXT | ({"label_column": "y"} if task == "sequence_classification" else {})
    section = {"sequence_length": length, "calibration_rows": 1, **further}
    section |= {"train": text, "evaluation": text}
    bench = new_bench(PREPARE_DATA, section, folder, {"teacher": folder / "teacher"})
    sources = {r: resolve_text(str(folder / f"{r}.jsonl"), None) for r in ("train", "evaluation")}
    changes = {"sources": sources, "section": bench.order.section | {"task": task}}
    return prepare_data.work(replace(bench, order=bench.order.model_copy(update=changes))).metrics


@pytest.mark.parametrize(
    ("teacher", "task", "limit"),
    [
        (tiny_bert_masked, "masked_lm", 128),
        (tiny_roberta, "sequence_classification", 32),  # 34 places, two of them before the first
    ],
)
def test_rows_beyond_a_table_of_positions_are_refused(
    tmp_path: Path, teacher: Any, task: str, limit: int
) -> None:
    (tmp_path / "fits").mkdir()
    assert prepared(tmp_path / "fits", teacher(), task, limit)["train_rows"] >= 2
    (tmp_path / "beyond").mkdir()
    with pytest.raises(
        RecipeError, match=rf"sequence_length: rows of at most {limit} .* {limit + 1}"
    ):
        prepared(tmp_path / "beyond", teacher(), task, limit + 1)


def test_turned_positions_have_no_table(tmp_path: Path) -> None:
    assert prepared(tmp_path, tiny_llama(), "causal_lm", 129)["train_rows"] >= 2


def test_distances_have_no_end(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    places = {"max_position_embeddings": 32, "position_buckets": 16, "relative_attention": True}
    config = DebertaV2Config(
        **sizes, **places, position_biased_input=False, num_attention_heads=4, pooler_hidden_size=32
    )
    teacher = seeded(DebertaV2ForSequenceClassification, config)
    assert prepared(tmp_path, teacher, "sequence_classification", 40)["train_rows"] >= 2
