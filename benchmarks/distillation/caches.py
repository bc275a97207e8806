"""What is kept of the teacher: students of each kind of cache against one of dense logits."""

from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.claims import at_least, at_most, write_measure
from benchmarks.comparison import paired_difference, paired_ratio
from benchmarks.distillation.online import OnlineTeacher
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import (
    held_out_kl,
    load_teacher,
    new_student,
    train_rows,
    training,
)
from benchmarks.text import text_source
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.teacher_cache import CacheOptions, TeacherCache, capture
from stillroom.training.loop import train

LAYERS = 6
DEFAULT, BIASED = "head and drawn tail", "top 12"
KINDS = {
    DEFAULT: CacheOptions(),
    "12 drawn": replace(CacheOptions(), head=0, draws=12),
    BIASED: replace(CacheOptions(), kind="top_k", head=12, draws=0),
}
BYTES = 40.0
WORSE = 1.03


def measure_caches() -> None:
    """Train the same student on each kind of cache and on dense logits; compare on other text."""
    teacher = load_teacher()
    kl = {"dense": held_out_kl(teacher, _trained_online(teacher))}
    sizes: dict[str, float] = {}
    for name in KINDS:
        sizes[name] = captured(name).bytes_per_token
        kl[name] = held_out_kl(teacher, _trained(teacher, captured(name)))
    kl["no teacher"] = held_out_kl(teacher, _trained(teacher, None))
    ratios = {name: paired_ratio([each], [kl["dense"]]) for name, each in kl.items()}
    ours, biased = kl[DEFAULT], kl[BIASED]
    excess = paired_difference([biased], [[WORSE * each for each in ours]])
    claims = [
        at_most("the default cache's bytes a token", BYTES, sizes[DEFAULT]),
        at_most(
            "KL of a student of the default cache over that of dense logits",
            WORSE,
            ratios[DEFAULT].value,
            ratios[DEFAULT].standard_error,
        ),
        at_least(
            f"KL of a student of the {BIASED} less 1.03 times that of the default cache's, in "
            "paired standard errors",
            2.0,
            excess.value / excess.standard_error,
        ),
    ]
    rows = [
        {
            "targets": name,
            "kl_nats": sum(each) / len(each),
            "over_dense": ratios[name].value,
            "standard_error": ratios[name].standard_error,
            "bytes_per_token": sizes.get(name),
        }
        for name, each in kl.items()
    ]
    write_measure(measure_path("caches"), claims, text=text_source(), layers=LAYERS, rows=rows)


@cache
def captured(name: str = DEFAULT) -> TeacherCache:
    """Return the teacher's targets of the training rows, captured once a process."""
    rows = train_rows()
    folder = bench_folder() / "caches" / name.replace(" ", "-")
    return capture(load_teacher(), rows, folder, KINDS[name], tokenizer_hash=rows.tokenizer_hash)


def _trained(teacher: Any, cache: TeacherCache | None) -> Any:
    student = new_student(teacher, LAYERS)
    distill(student, Taught(train_rows(), cache), DistillationOptions(training()))
    return student


def _trained_online(teacher: Any) -> Any:
    student = new_student(teacher, LAYERS)
    train(student, train_rows(), OnlineTeacher(teacher), training())
    return student
