"""SmolLM2 with a third, a half and two thirds of its layers left out, from one cache."""

import math
from typing import Any

import torch

from benchmarks.claims import write_measure
from benchmarks.distillation.caches import captured
from benchmarks.distillation.places import measure_path
from benchmarks.distillation.work import (
    held_out_kl,
    load_teacher,
    new_student,
    test_rows,
    train_rows,
    training,
)
from benchmarks.text import text_source
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.fine_tuning import measure

DEPTHS = (10, 15, 20)


def measure_depths() -> None:
    """Train students of several depths once over the rows, and measure them on other text."""
    teacher = load_teacher()
    cache = captured()
    rows = [{"layers": 30, "kl_nats": 0.0, **_perplexity(teacher)}]
    for layers in DEPTHS:
        student = new_student(teacher, layers)
        untrained = held_out_kl(teacher, student)
        distill(student, Taught(train_rows(), cache), DistillationOptions(training()))
        kl = held_out_kl(teacher, student)
        rows.append(
            {
                "layers": layers,
                "kl_nats": sum(kl) / len(kl),
                "untrained_kl_nats": sum(untrained) / len(untrained),
                **_perplexity(student),
            }
        )
    write_measure(measure_path("depths"), [], text=text_source(), rows=rows)


def _perplexity(model: Any) -> dict[str, float]:
    parameters = sum(each.numel() for each in model.parameters())
    with torch.no_grad():
        found = measure(model, test_rows(), 4)
    nats = found["held_out_cross_entropy_nats"]
    return {"perplexity": math.exp(nats), "parameters": parameters}
