"""What each stage is ordered to do: which part of the recipe it reads, and what it takes."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from stillroom.config import Adapter, Data, Distillation, Model, Quantization, Recipe, Text, Training
from tasks.hardware import hardware_name, threads_here
from tasks.sources import Source
from tasks.stages import (
    CACHE_TEACHER,
    DISTILL_STUDENT,
    EVALUATE_MODEL,
    IMPORT_MODEL,
    PREPARE_DATA,
    QUANTIZE_MODEL,
    TRAIN_ADAPTER,
    TUNE_TEACHER,
    Artifact,
    Order,
    Stage,
    as_json,
    make_order,
)

A = TypeVar("A", bound=Artifact)
Do = Callable[[Order, dict[str, A]], A]
Resolve = Callable[[Model | Text], Source]

# Where a source is enters a key as the identity of what is there, not by name.
PLACE = ("source", "revision")
# How often work is saved changes nothing of what comes of it.
RHYTHM = ("checkpoint_every_steps",)


class Orders(Generic[A]):
    """Write the orders of one recipe and hand each to `do`, with the artifacts it takes."""

    def __init__(self, recipe: Recipe, resolve: Resolve, do: Do[A]) -> None:
        self.recipe = recipe
        self.resolve = resolve
        self.do = do

    def import_model(self) -> A:
        """Order the teacher's checkpoint."""
        model = self.recipe.teacher
        section = as_json(model, *PLACE, "config", "fine_tune") | {"task": self.recipe.task}
        return self._order(
            IMPORT_MODEL, "import teacher", section, sources={"source": self.resolve(model)}
        )

    def import_champion(self, uri: str) -> A:
        """Order the checkpoint of the version that is registered now."""
        model = Model(source=uri, dtype=self.recipe.teacher.dtype)
        section = as_json(model, *PLACE, "config", "fine_tune") | {"task": self.recipe.task}
        return self._order(
            IMPORT_MODEL, "import champion", section, sources={"source": self.resolve(model)}
        )

    def prepare_data(self, title: str, data: Data, teacher: A) -> A:
        """Order rows of tokens for training, evaluation and calibration."""
        texts = {"train": data.train} | ({"evaluation": data.evaluation} if data.evaluation else {})
        section = as_json(data, *texts) | {"task": self.recipe.task}
        section |= {role: as_json(text, *PLACE) for role, text in texts.items()}
        sources = {role: self.resolve(text) for role, text in texts.items()}
        return self._order(PREPARE_DATA, title, section, sources=sources, teacher=teacher)

    def tune_teacher(self, training: Training, teacher: A, data: A) -> A:
        """Order a teacher that has learned the task's labels."""
        section = {"training": as_json(training, *RHYTHM), "task": self.recipe.task}
        return self._order(
            TUNE_TEACHER, "tune teacher", section, rhythm(training), teacher=teacher, data=data
        )

    def cache_teacher(self, distillation: Distillation, teacher: A, data: A) -> A:
        """Order the teacher's outputs on the training rows."""
        section = as_json(distillation.cache) | {
            "temperature": distillation.temperature,
            "task": self.recipe.task,
        }
        return self._order(
            CACHE_TEACHER, "cache teacher", section, teacher=teacher, data=data
        )

    def distill_student(
        self, title: str, distillation: Distillation, teacher: A, data: A, cache: A | None
    ) -> A:
        """Order a student; without `cache`, one that learns from the text alone."""
        section = as_json(distillation, "cache", "training") | {
            "training": as_json(distillation.training, *RHYTHM),
            "task": self.recipe.task,
        }
        artifacts = {"teacher": teacher, "data": data} | ({"cache": cache} if cache else {})
        return self._order(
            DISTILL_STUDENT, title, section, rhythm(distillation.training), **artifacts
        )

    def quantize_model(self, title: str, quantization: Quantization, base: A, data: A) -> A:
        """Order the base with its weights in few bits."""
        section = as_json(quantization) | {"task": self.recipe.task}
        return self._order(QUANTIZE_MODEL, title, section, base=base, data=data)

    def train_adapter(self, adapter: Adapter, base: A, data: A) -> A:
        """Order an adapter on the frozen base."""
        section = as_json(adapter, "data", "training") | {
            "training": as_json(adapter.training, *RHYTHM),
            "task": self.recipe.task,
        }
        title = f"train adapter {adapter.name}"
        return self._order(
            TRAIN_ADAPTER, title, section, rhythm(adapter.training), base=base, data=data
        )

    def evaluate_model(
        self, title: str, teacher: A, model: A, data: A, adapter: A | None = None
    ) -> A:
        """Order the figures of one model on one held-out text."""
        threads = self.recipe.execution.threads or threads_here()
        section = as_json(self.recipe.evaluation) | {
            "task": self.recipe.task,
            "hardware": hardware_name(threads),
        }
        artifacts = {"teacher": teacher, "model": model, "data": data}
        return self._order(
            EVALUATE_MODEL, title, section, **artifacts, **({"adapter": adapter} if adapter else {})
        )

    def _order(
        self,
        stage: Stage,
        title: str,
        section: dict[str, Any],
        unkeyed: dict[str, Any] | None = None,
        sources: dict[str, Source] | None = None,
        **artifacts: A,
    ) -> A:
        order = make_order(
            stage, title, section, self.recipe.seed, dict(artifacts), sources or {}, unkeyed or {}
        )
        return self.do(order, dict(artifacts))


def rhythm(training: Training) -> dict[str, Any]:
    """Return what of a training section stays out of the key."""
    return training.model_dump(mode="json", include=set(RHYTHM))
