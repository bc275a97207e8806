"""The size of a model and of its student, told from the config, against the models themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.shape import model_shape
from stillroom.config import Student
from stillroom.distillation.dense_student import dense_student
from stillroom.distillation.narrow import Width, narrow_student
from stillroom.distillation.student import initialise_student
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama
from tests.stillroom.tiny_mixtures import tiny_mixtral, tiny_qwen3_moe


@pytest.mark.parametrize(
    ("source", "parameters"), [("builtin:smollm2", 134.5e6), ("builtin:minilm", 22.7e6)]
)
def test_the_shape_of_a_builtin_model_is_near_its_true_size(source: str, parameters: float) -> None:
    assert model_shape(source).parameters == pytest.approx(parameters, rel=0.03)


def shape_of(model: Any, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return model_shape(folder)


def size(model: Any) -> int:
    # Without norms and biases, which are small in models that are not tiny.
    return sum(each.numel() for each in model.parameters() if each.dim() > 1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral, tiny_qwen3_moe])
def test_experts_count_for_memory_and_those_of_a_token_for_time(make: Any, tmp_path: Path) -> None:
    model = make()
    shape = shape_of(model, tmp_path)
    routers = sum(p.numel() for n, p in model.named_parameters() if "gate.weight" in n)
    assert shape.parameters == size(model) - routers
    if shape.experts > 1:
        unused = shape.experts - shape.experts_of_a_token
        experts = 3 * shape.hidden * shape.inner * shape.layers
        assert shape.parameters - shape.active_parameters == unused * experts


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
def test_a_dense_student_has_one_feed_forward_layer(make: Any, tmp_path: Path) -> None:
    teacher = make()
    student = initialise_student(dense_student(teacher, "mean"), (0,))
    shape = shape_of(teacher, tmp_path).of_student(Student(layers=1, experts="mean"))
    assert shape.parameters == shape.active_parameters == size(student)


def test_a_narrower_student_is_smaller(tmp_path: Path) -> None:
    teacher = tiny_llama(layers=3)
    narrow = Width(hidden_size=24, intermediate_size=40, attention_heads=2)
    student = narrow_student(initialise_student(teacher, (0, 2)), narrow, token_rows(4))
    section = Student(layers=(0, 2), hidden_size=24, intermediate_size=40, attention_heads=2)
    assert shape_of(teacher, tmp_path).of_student(section).parameters == size(student)
