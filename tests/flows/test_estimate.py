"""What --plan says that a stage takes, against what the recipe asks for."""

from typing import Any

import pytest

from flows.estimate import FLOPS_A_THREAD, START_SECONDS, Estimate, _data_of, estimate
from flows.shape import Shape
from stillroom.config import Recipe, validate
from stillroom.hardware import threads_here
from tasks.stages import (
    DISTILL_STUDENT,
    QUANTIZE_MODEL,
    RUN_TRIAL,
    TRAIN_ADAPTER,
    TUNE_TEACHER,
    Order,
    Stage,
)

SHAPE = Shape(30, 576, 1536, 9, 3, 64, True, 49152, 1)


def recipe_of(data: dict[str, int], **sections: Any) -> Recipe:
    text = {"train": {"source": "text.jsonl"}, "sequence_length": 100}
    common = {"name": "planned", "teacher": {"source": "elsewhere"}, "data": text | data}
    return validate(common | sections, "test")


def planned(stage: Stage, **training: Any) -> Estimate:
    student = {"student": {"layers": 15}, "training": training}
    recipe = recipe_of({"max_train_tokens": 2_000_000}, distillation=student)
    assert recipe.distillation
    trained = recipe.distillation.training.model_dump(mode="json")
    section = {"training": trained, "trial": {"dimension": 0}}
    return estimate(Order(title="train", stage=stage, section=section, seed=0), recipe, SHAPE)


@pytest.mark.parametrize(
    "stage", [TUNE_TEACHER, DISTILL_STUDENT, TRAIN_ADAPTER, RUN_TRIAL], ids=lambda each: each.name
)
def test_a_training_takes_as_long_as_its_steps_or_its_epochs(stage: Stage) -> None:
    whole = planned(stage, epochs=1)
    # 5 rows of 100 tokens, twice a step, are a fifth of the tokens after 400 steps.
    some = planned(stage, epochs=1, steps=400, batch_rows=5, gradient_accumulation=2)
    twice = planned(stage, epochs=2)
    assert some.seconds - START_SECONDS == pytest.approx((whole.seconds - START_SECONDS) / 5)
    assert twice.seconds - START_SECONDS == pytest.approx((whole.seconds - START_SECONDS) * 2)


def quantized(**section: Any) -> Estimate:
    recipe = recipe_of({"calibration_rows": 128}, quantization=section)
    assert recipe.quantization
    asked = recipe.quantization.model_dump(mode="json")
    return estimate(
        Order(title="quantize", stage=QUANTIZE_MODEL, section=asked, seed=0), recipe, SHAPE
    )


def test_mixed_bits_take_as_long_as_their_choices_are_many() -> None:
    """Each is a forward pass through half of the blocks, for four kinds of layers a block."""
    plain = quantized().seconds
    two = quantized(mixed={"max_bytes": 10**9, "bits": [2, 4]}).seconds - plain
    six = quantized(mixed={"max_bytes": 10**9, "bits": [2, 4], "group_sizes": [32, 64, 96]}).seconds
    few = quantized(mixed={"max_bytes": 10**9, "bits": [2, 4], "measured_tokens": 64}).seconds
    assert six - plain == pytest.approx(3 * two)
    assert few - plain == pytest.approx(two / 2)
    flops = 30 * 4 * 2 * 2 * 128 * 100 * 30 * SHAPE.block_parameters / 2
    assert two == pytest.approx(flops / (FLOPS_A_THREAD * threads_here()))
    assert two > 10 * (plain - START_SECONDS)


@pytest.mark.parametrize(
    ("title", "lengths"),
    [
        ("train adapter law", 1),
        ("evaluate student + law on law", 1),
        ("train adapter case-law", 2),
        ("evaluate student", 3),
    ],
)
def test_an_adapters_stages_are_counted_with_its_own_text(title: str, lengths: int) -> None:
    def data(length: int) -> dict[str, Any]:
        return {"train": {"source": "text.jsonl"}, "sequence_length": length}

    recipe = validate(
        {
            "name": "planned",
            "teacher": {"source": "elsewhere"},
            "data": data(300),
            "adapters": [
                {"name": "law", "data": data(100)},
                {"name": "case-law", "data": data(200)},
                {"name": "student", "data": data(400)},
            ],
        },
        "test",
    )
    order = Order(title=title, stage=TRAIN_ADAPTER, section={}, seed=0)
    assert _data_of(order, recipe).sequence_length == 100 * lengths
