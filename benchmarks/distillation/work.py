"""The fixed work: SmolLM2 as the teacher, rows of text, and how far a student is from it."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.distillation.places import bench_folder
from benchmarks.text import texts
from stillroom.builtin import import_builtin
from stillroom.data.examples import Examples
from stillroom.distillation.losses import dense_kl, next_labels
from stillroom.distillation.student import choose_layers, initialise_student
from stillroom.models import load_model, load_tokenizer, tokenizer_hash
from stillroom.training.options import TrainingOptions

FULL = os.environ.get("FULL") == "1"
LENGTH = 128  # tokens a row
TRAIN_ROWS = 1024 if FULL else 256
TEST_ROWS = 64
BATCH = 4
TEACHER_LAYERS = 30
SEED = 7


def teacher_folder() -> Path:
    """Return the folder of SmolLM2, made if it is absent."""
    folder = bench_folder() / "teacher"
    if not (folder / "config.json").exists():
        import_builtin("smollm2", folder)
    return folder


@cache
def load_teacher() -> Any:
    """Return SmolLM2 in fp32, in evaluation mode; nobody changes it."""
    return load_model(teacher_folder(), dtype=torch.float32).eval()


def new_student(teacher: Any, layers: int) -> Any:
    """Return a student with so many of the teacher's layers, evenly spread."""
    return initialise_student(teacher, choose_layers(TEACHER_LAYERS, layers))


def training(**changes: Any) -> TrainingOptions:
    """Return how every student is trained: once over the rows."""
    chosen = {"batch_rows": BATCH, "learning_rate": 5e-4, "seed": SEED} | changes
    return TrainingOptions(**chosen)


@cache
def train_rows(count: int = TRAIN_ROWS) -> Examples:
    """Return rows to learn from, drawn from all of the training text."""
    return _rows(0, count)


@cache
def test_rows() -> Examples:
    """Return rows to measure on, from another text."""
    return _rows(1, TEST_ROWS)


@torch.no_grad()
def held_out_kl(teacher: Any, student: Any) -> list[float]:
    """Return KL(teacher ‖ student) on each test row, in nats a token."""
    rows = test_rows()
    student.eval()
    found: list[float] = []
    for ids in rows.input_ids.split(BATCH):
        labels = next_labels(ids)
        p = teacher(input_ids=ids, use_cache=False).logits
        q = student(input_ids=ids, use_cache=False).logits
        found += [dense_kl(q[i], p[i], labels[i]).item() for i in range(len(ids))]
    return found


def _rows(side: int, wanted: int) -> Examples:
    tokenizer = load_tokenizer(teacher_folder())
    ids: Tensor = tokenizer(texts()[side], verbose=False, return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    rows = rows[order[:wanted]].clone()
    return Examples(
        rows, torch.ones_like(rows), rows, torch.arange(len(rows)), tokenizer_hash(tokenizer)
    )
