"""The road: which stages a recipe asks for, in which order, and what each takes from which.

Planning and running walk the same road; they differ in what they do with an order.
"""

from dataclasses import dataclass
from typing import Generic

from flows.orders import A, Orders
from stillroom.config import BASE_TEXT, Recipe


@dataclass(frozen=True)
class Measured(Generic[A]):
    """A row of the report: a model, perhaps with an adapter, measured on a held-out text."""

    label: str
    text: str
    model: A
    evaluation: A
    adapter: A | None = None
    control: bool = False


@dataclass(frozen=True)
class Made(Generic[A]):
    """What the road leaves behind."""

    teacher: A
    data: A
    final: A
    adapters: dict[str, A]
    merged: dict[str, A]
    measured: list[Measured[A]]

    def bases(self, name: str) -> dict[str, A]:
        """The models that stand alone, by the names they are registered under."""
        return {name: self.final} | {
            merged_name(name, each): merged for each, merged in self.merged.items()
        }

    @property
    def road(self) -> list[Measured[A]]:
        """The models on the way from the teacher to the final one, on the base's text."""
        return [row for row in self.measured if not row.control and row.text == BASE_TEXT]


def merged_name(name: str, adapter: str) -> str:
    """Return what a base is registered as that an adapter is merged into."""
    return f"{name}-{adapter}-merged"


ALONE = {"soft_weight": 0.0, "hard_weight": 1.0, "cosine_weight": 0.0}


def walk(recipe: Recipe, orders: Orders[A]) -> Made[A]:
    """Order every stage of `recipe` and return what came of it."""
    teacher = orders.import_model()
    if recipe.teacher.vocabulary:
        teacher = orders.trim_vocabulary(recipe.teacher.vocabulary.minimum_uses, teacher)
    data = orders.prepare_data("prepare data", recipe.data, teacher)
    if recipe.teacher.fine_tune:
        teacher = orders.tune_teacher(recipe.teacher.fine_tune, teacher, data)

    models = {"teacher": teacher}
    final, name = teacher, "teacher"
    if recipe.distillation:
        caches = orders.cache_teacher(recipe.distillation, teacher, data)
        final, name = (
            orders.distill_student("distil student", recipe.distillation, teacher, data, caches),
            "student",
        )
        models[name] = final
    before_quantization = final
    if recipe.quantization:
        final = orders.quantize_model("quantize", recipe.quantization, final, data)
        name = f"quantized {name}"
        models[name] = final

    measured = [
        Measured(
            label,
            BASE_TEXT,
            model,
            orders.evaluate_model(f"evaluate {label}", teacher, model, data),
        )
        for label, model in models.items()
    ]
    measured += _controls(recipe, orders, teacher, before_quantization, data)
    made = Made(teacher, data, final, {}, {}, measured)
    _adapt(recipe, orders, made, name)
    return made


def _adapt(recipe: Recipe, orders: Orders[A], made: Made[A], name: str) -> None:
    """Order every adapter, and the base with, without and merged with it on its own text."""
    teacher, base = made.teacher, made.final
    for section in recipe.adapters:
        data = orders.prepare_data(f"prepare data {section.name}", section.data, teacher)
        adapter = orders.train_adapter(section, base, data)
        made.adapters[section.name] = adapter
        shown = [(name, base, None), (f"{name} + {section.name}", base, adapter)]
        if section.method == "lora" and section.merge:
            merged = orders.merge_adapter(section.name, section.merge, base, adapter, data)
            made.merged[section.name] = merged
            shown.append((f"{name} + {section.name}, merged", merged, None))
        for label, model, worn in shown:
            title = f"evaluate {label} on {section.name}"
            evaluation = orders.evaluate_model(title, teacher, model, data, worn)
            made.measured.append(Measured(label, section.name, model, evaluation, worn))


def _controls(recipe: Recipe, orders: Orders[A], teacher: A, base: A, data: A) -> list[Measured[A]]:
    """Order what is made only to judge the result."""
    made: dict[str, A] = {}
    if "cross_entropy" in recipe.controls and recipe.distillation:
        alone = recipe.distillation.model_copy(update=ALONE)
        label = "student without teacher"
        made[label] = orders.distill_student(f"train {label}", alone, teacher, data, {})
    if "round_to_nearest" in recipe.controls and recipe.quantization:
        rounded = recipe.quantization.model_copy(update={"method": "rtn"})
        label = "rounded to nearest"
        made[label] = orders.quantize_model(f"quantize, {label}", rounded, base, data)
    return [
        Measured(
            label,
            BASE_TEXT,
            model,
            orders.evaluate_model(f"evaluate {label}", teacher, model, data),
            control=True,
        )
        for label, model in made.items()
    ]
