"""The stage that distils: what each kind of student in the recipe becomes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillroom.config import Distillation
from stillroom.errors import RecipeError
from stillroom.models import load_model, save_model
from tasks.stages import DISTILL_STUDENT, as_json
from tasks.work import distill_student
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer
from tests.stillroom.tiny_mixtures import tiny_mixtral
from tests.tasks.benches import new_bench


@pytest.fixture
def distil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    prepared = SimpleNamespace(
        train=token_rows(8), evaluation=token_rows(4), calibration=token_rows(4)
    )
    monkeypatch.setattr(distill_student, "load_prepared", lambda _: prepared)

    def work(teacher: Any, **student: Any) -> Any:
        save_model(teacher, tiny_tokenizer(), tmp_path / "teacher")
        section = Distillation.model_validate(
            {"student": student, "soft_weight": 0, "hard_weight": 1, "training": {"steps": 2}}
        )
        given = as_json(section, "cache", "preset")
        inputs = {"teacher": tmp_path / "teacher", "data": tmp_path}
        bench = new_bench(DISTILL_STUDENT, given, tmp_path, inputs)
        metrics = distill_student.work(bench).metrics
        assert metrics["reload_max_difference"] < 1e-5 * metrics["reload_max_logit"]
        return load_model(bench.output)

    return work


def test_a_student_has_some_layers_of_its_teacher(distil: Any) -> None:
    student = distil(tiny_llama(layers=3), layers=2)
    assert student.config.num_hidden_layers == 2


def test_a_student_is_as_narrow_as_the_recipe_says(distil: Any) -> None:
    widths = {"hidden_size": 24, "intermediate_size": 40, "attention_heads": 2}
    config = distil(tiny_llama(layers=3), layers=2, **widths).config
    assert config.num_hidden_layers == 2
    assert (config.hidden_size, config.intermediate_size) == (24, 40)
    assert config.num_attention_heads == 2


@pytest.mark.parametrize("experts", ["mean", "most_used"])
def test_a_mixture_becomes_dense_where_the_recipe_says_so(distil: Any, experts: str) -> None:
    student = distil(tiny_mixtral(), layers=1, experts=experts)
    assert type(student).__name__ == "MistralForCausalLM"
    assert student.config.num_hidden_layers == 1


def test_a_mixture_stays_one_otherwise(distil: Any) -> None:
    student = distil(tiny_mixtral(), layers=1)
    assert type(student).__name__ == "MixtralForCausalLM"


def test_a_dense_teacher_has_no_experts(distil: Any) -> None:
    with pytest.raises(RecipeError, match="LlamaForCausalLM came, which has no experts"):
        distil(tiny_llama(layers=3), layers=1, experts="mean")
