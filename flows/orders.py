"""What each stage is ordered to do: which part of the recipe it reads, and what it takes."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from stillroom.config import (
    Adapter,
    Data,
    DimensionSearch,
    Distillation,
    IntrinsicDimension,
    Merge,
    Model,
    Quantization,
    Recipe,
    Text,
    Training,
)
from stillroom.hardware import gpu_names, hardware_name, threads_here
from stillroom.intrinsic_dimension.search import Trial
from tasks.errand import class_of_workers
from tasks.sources import Source
from tasks.stages import (
    CACHE_TEACHER,
    DISTILL_STUDENT,
    EVALUATE_MODEL,
    FIT_DIMENSION,
    IMPORT_MODEL,
    MERGE_ADAPTER,
    PREPARE_DATA,
    QUANTIZE_MODEL,
    RUN_TRIAL,
    TRAIN_ADAPTER,
    TRIM_VOCABULARY,
    TRUSTS_CODE,
    TUNE_TEACHER,
    Artifact,
    Order,
    Stage,
    as_json,
)

A = TypeVar("A", bound=Artifact)
Do = Callable[[Order, dict[str, A]], A]
Resolve = Callable[[Model | Text], Source]

# Where a source is enters a key as the identity of what is there, not by name.
PLACE = ("source", "revision")
# How often work is saved, and what is made again, change nothing of what comes of it.
RHYTHM = ("checkpoint_every_steps", "gradient_checkpointing")


class Orders(Generic[A]):
    """Write the orders of one recipe and hand each to `do`, with the artifacts it takes."""

    def __init__(self, recipe: Recipe, resolve: Resolve, do: Do[A]) -> None:
        self.recipe = recipe
        self.resolve = resolve
        self.do = do

    def import_model(self, title: str = "import teacher") -> A:
        """Order the checkpoint of the teacher, or of whatever else is started from."""
        return self._import(title, self.recipe.teacher)

    def import_champion(self, uri: str) -> A:
        """Order the checkpoint of the version that is registered now."""
        champion = Model(source=uri, dtype=self.recipe.teacher.dtype)
        return self._import("import champion", champion)

    def trim_vocabulary(self, minimum_uses: int, teacher: A) -> A:
        """Order the teacher with only the words that the recipe's texts use."""
        all_data = {"base": self.recipe.data}
        all_data |= {f"adapter-{each.name}": each.data for each in self.recipe.adapters}
        texts = {
            f"{name}-{role}": text
            for name, data in all_data.items()
            for role, text in (("train", data.train), ("evaluation", data.evaluation))
            if text is not None
        }
        section: dict[str, Any] = {role: as_json(text, *PLACE) for role, text in texts.items()}
        section |= {"minimum_uses": minimum_uses}
        if self.recipe.task == "masked_lm":
            # A bare encoder is refused where no training follows.
            section |= {"new_head": self.recipe.teacher.fine_tune is not None}
        sources = {role: self.resolve(text) for role, text in texts.items()}
        return self._order(
            TRIM_VOCABULARY,
            "trim vocabulary",
            section,
            {"teacher": teacher},
            sources=sources,
        )

    def prepare_data(self, title: str, data: Data, teacher: A) -> A:
        """Order rows of tokens for training, evaluation and calibration."""
        texts = {"train": data.train} | ({"evaluation": data.evaluation} if data.evaluation else {})
        # Other tasks hide no words: their keys do not hang on how many it would be.
        unread = () if self.recipe.task == "masked_lm" else ("masked_fraction",)
        section = as_json(data, *texts, *unread)
        section |= {role: as_json(text, *PLACE) for role, text in texts.items()}
        sources = {role: self.resolve(text) for role, text in texts.items()}
        return self._order(PREPARE_DATA, title, section, {"teacher": teacher}, sources=sources)

    def tune_teacher(self, training: Training, teacher: A, data: A) -> A:
        """Order a teacher that has learned the task's labels or hidden words."""
        inputs = {"teacher": teacher, "data": data}
        return self._training(TUNE_TEACHER, "tune teacher", {}, training, inputs)

    def cache_teacher(self, distillation: Distillation, teacher: A, data: A) -> dict[str, A]:
        """Order the teacher's outputs on the training rows, and where they decide when to stop on
        the held-out rows."""
        section = as_json(distillation.cache) | {"temperature": distillation.temperature}
        inputs = {"teacher": teacher, "data": data}
        execution = self.recipe.execution
        workers: dict[str, Any] = {"workers": execution.cache_workers, "over": execution.cache_over}
        workers |= self._layout
        ordered = {"cache": self._order(CACHE_TEACHER, "cache teacher", section, inputs, workers)}
        if distillation.training.early_stopping_patience:
            title = "cache teacher, held-out rows"
            section |= {"rows": "evaluation", "hidden_states": "none", "audit_rows": 0}
            cache = self._order(CACHE_TEACHER, title, section, inputs, workers)
            ordered["evaluation_cache"] = cache
        return ordered

    def distill_student(
        self, title: str, distillation: Distillation, teacher: A, data: A, caches: dict[str, A]
    ) -> A:
        """Order a student; without `caches`, one that learns from the text alone."""
        section = as_json(distillation, "cache", "preset", "training")
        inputs = {"teacher": teacher, "data": data} | caches
        return self._training(DISTILL_STUDENT, title, section, distillation.training, inputs)

    def quantize_model(self, title: str, quantization: Quantization, base: A, data: A) -> A:
        """Order the base with its weights in few bits."""
        inputs = {"base": base, "data": data}
        return self._order(QUANTIZE_MODEL, title, as_json(quantization), inputs)

    def train_adapter(self, adapter: Adapter, base: A, data: A) -> A:
        """Order an adapter on the frozen base."""
        section = as_json(adapter, "data", "training", "merge")
        title, inputs = f"train adapter {adapter.name}", {"base": base, "data": data}
        return self._training(TRAIN_ADAPTER, title, section, adapter.training, inputs)

    def merge_adapter(self, name: str, merge: Merge, base: A, adapter: A, data: A) -> A:
        """Order a quantized model with an adapter in its weights, quantized as the base is."""
        assert self.recipe.quantization is not None, "the recipe refuses it otherwise"
        section = as_json(self.recipe.quantization) | as_json(merge) | {"name": name}
        inputs = {"base": base, "adapter": adapter, "data": data}
        return self._order(MERGE_ADAPTER, f"merge adapter {name}", section, inputs)

    def evaluate_model(
        self, title: str, teacher: A, model: A, data: A, adapter: A | None = None
    ) -> A:
        """Order the figures of one model on one held-out text."""
        section = as_json(self.recipe.evaluation) | {"hardware": self._hardware}
        inputs = {"teacher": teacher, "model": model, "data": data}
        inputs |= {"adapter": adapter} if adapter else {}
        return self._order(EVALUATE_MODEL, title, section, inputs, self._layout)

    def run_trial(self, trial: Trial, recipe: IntrinsicDimension, base: A, data: A) -> A:
        """Order one trial of a search: a training in a subspace, or of all parameters."""
        search, seeded = recipe.search, asdict(trial)
        kept = {"projection", "structure_aware"} if trial.dimension else set[str]()
        section = search.model_dump(mode="json", include=kept) | {"trial": seeded}
        training = recipe.subspace if trial.dimension else recipe.full
        inputs = {"base": base, "data": data}
        return self._training(RUN_TRIAL, trial.name, section, training, inputs)

    def fit_dimension(self, search: DimensionSearch, trials: dict[Trial, A]) -> A:
        """Order the curve and the dimension that finished trials come to."""
        inputs = {trial.name: artifact for trial, artifact in trials.items()}
        section = as_json(search, "projection", "structure_aware", "workers")
        return self._order(FIT_DIMENSION, "fit dimension", section, inputs)

    @property
    def _hardware(self) -> str:
        """What speeds are measured on: they are compared with those of the same alone."""
        execution = self.recipe.execution
        if execution.over == "workers":
            return class_of_workers(execution.deployment, execution.threads)
        name = hardware_name(execution.threads or threads_here())
        return f"{name}, {gpu_names()}" if execution.device == "cuda" else name

    @property
    def _layout(self) -> dict[str, Any]:
        return {"teacher_device_map": self.recipe.execution.teacher_device_map}

    @property
    def _for_all(self) -> dict[str, Any]:
        """What every stage reads."""
        read = {"task": self.recipe.task, "device": self.recipe.execution.device}
        # A model's own code computes something else than what else may load it.
        return read | ({TRUSTS_CODE: True} if self.recipe.teacher.trust_remote_code else {})

    def _import(self, title: str, model: Model) -> A:
        section = as_json(model, *PLACE, "config", "fine_tune", "vocabulary")
        return self._order(
            IMPORT_MODEL, title, section, {}, sources={"source": self.resolve(model)}
        )

    def _training(
        self,
        stage: Stage,
        title: str,
        section: dict[str, Any],
        training: Training,
        inputs: dict[str, A],
    ) -> A:
        execution = self.recipe.execution
        unkeyed = {
            "training": training.model_dump(mode="json", include=set(RHYTHM)),
            "processes": execution.training_processes,
            "parallel": execution.parallel,
        }
        section = section | {"training": as_json(training, *RHYTHM)}
        return self._order(stage, title, section, inputs, unkeyed)

    def _order(
        self,
        stage: Stage,
        title: str,
        section: dict[str, Any],
        inputs: dict[str, A],
        unkeyed: dict[str, Any] | None = None,
        *,
        sources: dict[str, Source] | None = None,
    ) -> A:
        order = Order(
            title=title,
            stage=stage,
            section=section | self._for_all,
            unkeyed=unkeyed or {},
            seed=self.recipe.seed,
            sources=sources or {},
            inputs={role: artifact.key for role, artifact in inputs.items()},
        )
        return self.do(order, inputs)
