"""Seconds of a training step: from the cache, and with the teacher online."""

import time
from statistics import median
from typing import Any

import torch

from benchmarks.claims import at_least, at_most, write_measure
from benchmarks.distillation.caches import captured
from benchmarks.distillation.online import OnlineTeacher
from benchmarks.distillation.places import measure_path
from benchmarks.distillation.work import (
    BATCH,
    load_teacher,
    new_student,
    train_rows,
    training,
)
from benchmarks.text import text_source
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.teacher_cache import TeacherCache
from stillroom.training.loop import train

LAYERS = 10
ROUNDS = 7
STEPS = 4  # of which the first warms up


def measure_steps() -> None:
    """Time both kinds of step, interleaved, and how long the cache is read.

    A round compares the two in the same minute: machines are not as fast in the next.
    """
    teacher = load_teacher()
    cache = captured()
    rounds = [(median(_cached(teacher, cache)), median(_online(teacher))) for _ in range(ROUNDS)]
    cached, online = (median(each) for each in zip(*rounds, strict=True))
    slower = median(online / cached for cached, online in rounds)
    student = new_student(teacher, LAYERS)
    ratio = multiplications(teacher) * 2 / (multiplications(student) * 6)
    reading = median(_reading(cache) for _ in range(20))
    claims = [
        at_least(
            "seconds of a step with the teacher online over those of a cached one, over "
            "1 + F_teacher / F_student",
            0.95,
            slower / (1 + ratio),
        ),
        at_least(
            f"seconds of a step with the teacher online over those of a cached one, student of "
            f"{LAYERS} layers",
            1.7,
            slower,
        ),
        at_most("share of a step in which the cache is read", 0.05, reading / cached),
    ]
    write_measure(
        measure_path("steps"),
        claims,
        text=text_source(),
        layers=LAYERS,
        flops_teacher_over_student=ratio,
        reading_seconds=reading,
        rows=[
            {"teacher": "from the cache", "seconds": cached, "over_cached": 1.0},
            {"teacher": "online", "seconds": online, "over_cached": slower},
        ],
    )


def multiplications(model: Any) -> int:
    """Return the numbers of all matrices that a token is multiplied by, the tied head's included.

    A forward pass takes two operations for each, forward and backward six.
    """
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert head in linears
    return sum(module.weight.numel() for module in linears)


def _cached(teacher: Any, cache: TeacherCache) -> list[float]:
    student = new_student(teacher, LAYERS)
    options = DistillationOptions(training(steps=STEPS))
    return _seconds(distill(student, Taught(train_rows(), cache), options))


def _online(teacher: Any) -> list[float]:
    student = new_student(teacher, LAYERS)
    return _seconds(train(student, train_rows(), OnlineTeacher(teacher), training(steps=STEPS)))


def _seconds(history: Any) -> list[float]:
    tokens = BATCH * train_rows().input_ids.shape[1]
    return [tokens / speed for speed in history.tokens_per_second[1:]]


def _reading(cache: TeacherCache) -> float:
    rows = torch.randint(len(cache), (BATCH,))
    began = time.perf_counter()
    cache.targets(rows)
    return time.perf_counter() - began
