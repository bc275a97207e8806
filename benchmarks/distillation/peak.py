"""Peak memory of training from the cache, whatever the size of teacher and cache, and online."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Literal, get_args

from benchmarks.claims import at_most, write_measure
from benchmarks.depth import write_other_depth
from benchmarks.distillation.caches import DEFAULT, KINDS, captured
from benchmarks.distillation.online import OnlineTeacher
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import (
    TEACHER_LAYERS,
    load_teacher,
    teacher_folder,
    train_rows,
    training,
)
from benchmarks.places import ROOT
from benchmarks.text import text_source
from stillroom.distillation.cache_files import TeacherCache
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import load_student
from stillroom.distillation.teacher_cache import capture
from stillroom.streamed import open_streamed
from stillroom.training.loop import train

LAYERS = (0, 1, 2, 3)
STEPS = 4
RUNS = 3
FEW_ROWS = 16
Kind = Literal["cached", "online"]


def measure_peak() -> None:
    """Train the same student of two teachers and of two caches, each in a process of its own."""
    large, few = _deeper_teacher(), _small_cache()
    all_rows = captured().folder
    first = f"{TEACHER_LAYERS} teacher layers, {FEW_ROWS} rows of cache"
    cases: dict[str, tuple[Kind, Path, Path, int]] = {
        first: ("cached", teacher_folder(), few, FEW_ROWS),
        f"{2 * TEACHER_LAYERS} teacher layers over {TEACHER_LAYERS}": (
            "cached",
            large,
            few,
            FEW_ROWS,
        ),
        f"{len(train_rows())} rows of cache over {FEW_ROWS}": (
            "cached",
            teacher_folder(),
            all_rows,
            len(train_rows()),
        ),
        "the teacher online over the cache": ("online", teacher_folder(), few, FEW_ROWS),
    }
    peaks: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, case in cases.items():
            peaks[name].append(_in_a_process(*case))
    shares = {name: median(peaks[name]) / median(peaks[first]) for name in cases}
    claims = [
        at_most(f"peak memory of training from the cache, {name}", 1.05, shares[name])
        for name, (kind, *_) in cases.items()
        if kind == "cached" and name != first
    ]
    rows = [
        {"case": name, "gigabytes": median(peaks[name]) / 1e9, "over_first": shares[name]}
        for name in cases
    ]
    write_measure(
        measure_path("peak"), claims, text=text_source(), layers=len(LAYERS), runs=RUNS, rows=rows
    )


def train_and_print(kind: Kind, teacher: Path, cache: Path, rows: int) -> None:
    """Train a student for a few steps and print the process's largest resident size, in bytes."""
    model, blocks = open_streamed(teacher, task="causal_lm")
    student = load_student(model, blocks, LAYERS)
    examples = train_rows().take(slice(0, rows))
    if kind == "online":
        train(student, examples, OnlineTeacher(load_teacher()), training(steps=STEPS))
    else:
        options = DistillationOptions(training(steps=STEPS))
        distill(student, Taught(examples, TeacherCache.open(cache)), options)
    # Not ru_maxrss, which starts at what the process had that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)  # type: ignore[index]


def _in_a_process(kind: Kind, teacher: Path, cache: Path, rows: int) -> int:
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, kind, str(teacher), str(cache), str(rows)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def _deeper_teacher() -> Path:
    folder = bench_folder() / "teacher-deeper"
    if not (folder / "config.json").exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_other_depth(teacher_folder(), 2 * TEACHER_LAYERS, partial)
        partial.rename(folder)
    return folder


def _small_cache() -> Path:
    rows = train_rows().take(slice(0, FEW_ROWS))
    folder = bench_folder() / "caches" / "few-rows"
    options = KINDS[DEFAULT]
    capture(load_teacher(), rows, folder, options, tokenizer_hash=rows.tokenizer_hash)
    return folder


if __name__ == "__main__":
    chosen = next(kind for kind in get_args(Kind) if kind == sys.argv[1])
    train_and_print(chosen, Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
