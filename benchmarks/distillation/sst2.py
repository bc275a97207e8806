"""DistilBERT's claim on SST-2: half of MiniLM's layers, with and without the teacher."""

import json
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.claims import Claim, at_least, write_measure
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import FULL
from benchmarks.phrases import Example
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import (
    BATCH,
    NAMES,
    Right,
    as_rows,
    correct,
    glue_examples,
    has_sst2,
    points_lost,
    split,
)
from stillroom.builtin import import_builtin
from stillroom.data.examples import Examples
from stillroom.distillation.cache_files import FACTS
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import choose_layers, initialise_student
from stillroom.distillation.teacher_cache import CacheOptions, TeacherCache, capture
from stillroom.fine_tuning import fine_tune
from stillroom.models import load_model, load_pretrained, load_tokenizer, save_model
from stillroom.training.options import TrainingOptions

SEEDS = (0, 1, 2)
LABELLED = 4_000
ALL_EXAMPLES = 48_000 if FULL else 24_000
TEST_EXAMPLES = 10_000
TEACHER_LAYERS, STUDENT_LAYERS = 6, 3
TEACHER_PASSES = 3.0
TEMPERATURE = 2.0
LOWER = -1.96  # standard errors
SPEED_ROUNDS = 7


@dataclass(frozen=True)
class Variant:
    """How a student is made: what it learns from, how often, and where it starts."""

    name: str
    taught: bool  # by the teacher's outputs, instead of the labels
    initialised: bool = True  # with the teacher's layers
    rows: int = LABELLED
    passes: float = TEACHER_PASSES

    @property
    def title(self) -> str:
        """Return it in words."""
        return f"{self.name}, {'its layers' if self.initialised else 'random start'}"


LONG = ALL_EXAMPLES / LABELLED  # passes over the labels in as many steps as one over all phrases
OURS = Variant("teacher", True, rows=ALL_EXAMPLES, passes=1.0)
ALONE = (
    Variant("labels alone, in as many steps", False, passes=LONG),
    Variant("labels alone, in as many passes as the teacher", False),
)
VARIANTS = (
    OURS,
    Variant("teacher", True, False, rows=ALL_EXAMPLES, passes=1.0),
    Variant("teacher, of the labelled phrases alone", True),
    *ALONE,
    Variant("labels alone, in as many steps", False, False, passes=LONG),
    Variant("labels of all phrases", False, rows=ALL_EXAMPLES, passes=1.0),
)
TEACHER = "teacher"


def measure_sst2() -> None:
    """Fine-tune a teacher a seed, distil its students, and compare on held-out phrases.

    The teacher learns from the few phrases with labels; its student from what it says of all, the
    student without a teacher from the labels.
    """
    if not has_sst2():
        return
    _shipped()
    side_by_side(_prepare, [(seed,) for seed in SEEDS])
    cells = [(title, seed) for title in (TEACHER, *_variants()) for seed in SEEDS]
    right: dict[str, Right] = {}
    glue: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    for (title, _), found in zip(cells, side_by_side(_result, cells), strict=True):
        right.setdefault(title, []).append(found["right"])
        glue.setdefault(title, []).append(fmean(found["glue"]))
        parameters[title] = found["parameters"]
    test = split(TEST_EXAMPLES)[1]
    lost = {title: points_lost(right[TEACHER], each, test) for title, each in right.items()}
    rows = [
        {
            "model": title,
            "parameters": parameters[title],
            "accuracy": 100 * fmean(map(fmean, each)),
            "lost": lost[title].value,
            "standard_error": lost[title].standard_error,
            "glue": 100 * fmean(glue[title]),
        }
        for title, each in right.items()
    ]
    speed = _speed_ratio()
    write_measure(
        measure_path("sst2"),
        claims_of(right, test, speed),
        text="SST-2",
        rows=rows,
        seeds=len(SEEDS),
        examples=len(test),
        labelled=LABELLED,
        all_examples=ALL_EXAMPLES,
        speed=speed,
    )


def claims_of(right: dict[str, Right], test: list[Example], speed: float) -> list[Claim]:
    """Return what was promised of these figures; the rival is the better of those without."""
    kept = fmean(map(fmean, right[OURS.title])) / fmean(map(fmean, right[TEACHER]))
    rival = max((right[each.title] for each in ALONE), key=lambda each: fmean(map(fmean, each)))
    gain = points_lost(right[OURS.title], rival, test)
    return [
        at_least(
            "SST-2: share of the teacher's accuracy that the 3-layer student keeps", 0.97, kept
        ),
        at_least("SST-2: the 3-layer student's speed over its teacher's", 1.6, speed),
        at_least(
            "SST-2: points gained by the teacher over the better student of the labels alone, "
            "lower 95 % bound of the paired difference",
            0.0,
            gain.value + LOWER * gain.standard_error,
            gain.standard_error,
        ),
    ]


def _prepare(seed: int) -> None:
    """Make a seed's teacher, and ask it for all phrases, if that was not done."""
    folder = _teacher_folder(seed)
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        model = load_pretrained(_shipped(), task="sequence_classification", label_names=NAMES)
        fine_tune(model, _train_rows(LABELLED), _training(seed, TEACHER_PASSES))
        save_model(model, load_tokenizer(_shipped()), folder)
    for count in {variant.rows for variant in VARIANTS if variant.taught}:
        _cache(seed, count)


def _result(title: str, seed: int) -> dict[str, Any]:
    """Return what a model got right, which is trained if it was not."""
    name = f"sst2 of {ALL_EXAMPLES} {title} {seed}.json".replace(" ", "-").replace(",", "")
    path = bench_folder() / "cells" / name
    if not path.exists():
        model = _load_teacher(seed) if title == TEACHER else _student(_variants()[title], seed)
        found = {
            "right": correct(model, as_rows(split(TEST_EXAMPLES)[1], _shipped())),
            "glue": correct(model, as_rows(glue_examples(), _shipped())),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        print(f"{title}, seed {seed}: {100 * fmean(found['right']):.2f} %", flush=True)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def _variants() -> dict[str, Variant]:
    return {each.title: each for each in VARIANTS}


def _teacher_folder(seed: int) -> Path:
    return bench_folder() / f"sst2-teacher-{seed}-of-{ALL_EXAMPLES}"


def _load_teacher(seed: int) -> Any:
    return load_model(_teacher_folder(seed), task="sequence_classification").eval()


def _cache(seed: int, count: int) -> TeacherCache:
    """Return what a seed's teacher says of so many phrases."""
    folder = bench_folder() / "caches" / f"sst2-{seed}-{count}-of-{ALL_EXAMPLES}"
    if (folder / FACTS).exists():
        return TeacherCache.open(folder)
    rows = _train_rows(count)
    options = CacheOptions(
        kind="dense", temperature=TEMPERATURE, batch_rows=BATCH, rows_per_shard=4096
    )
    return capture(_load_teacher(seed), rows, folder, options, tokenizer_hash=rows.tokenizer_hash)


def _student(variant: Variant, seed: int) -> Any:
    student = initialise_student(_load_teacher(seed), choose_layers(TEACHER_LAYERS, STUDENT_LAYERS))
    if not variant.initialised:
        torch.manual_seed(seed)
        student = type(student)(student.config)
    rows = _train_rows(variant.rows)
    training = _training(seed, variant.passes)
    options = DistillationOptions(training, 1.0, 0.0, temperature=TEMPERATURE)
    distill(student, Taught(rows, _cache(seed, variant.rows) if variant.taught else None), options)
    return student.eval()


def _training(seed: int, passes: float) -> TrainingOptions:
    return TrainingOptions(
        epochs=passes,
        batch_rows=BATCH,
        learning_rate=1e-4,
        schedule="linear",
        seed=seed,
        bucket_by_length=True,
    )


def _speed_ratio() -> float:
    """Return how many times as fast the student is, medians of interleaved runs."""
    rows = as_rows(split(TEST_EXAMPLES)[1][:512], _shipped())
    teacher = _load_teacher(SEEDS[0])
    student = initialise_student(teacher, choose_layers(TEACHER_LAYERS, STUDENT_LAYERS))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(SPEED_ROUNDS):
        for is_teacher, model in ((True, teacher), (False, student)):
            began = time.perf_counter()
            correct(model, rows)
            seconds[is_teacher].append(time.perf_counter() - began)
    return median(seconds[True]) / median(seconds[False])


def _train_rows(count: int) -> Examples:
    """Return so many training phrases, the first of an order that is drawn once and for all."""
    order = random.Random(1).sample(split(TEST_EXAMPLES)[0], ALL_EXAMPLES)
    return as_rows(order[:count], _shipped())


@cache
def _shipped() -> Path:
    folder = bench_folder() / "minilm"
    if not (folder / "config.json").exists():
        import_builtin("minilm", folder)
    return folder
