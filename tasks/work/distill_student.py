"""Make a student of some of the teacher's layers, and train it on what the teacher said."""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from stillroom.blocks import find_blocks
from stillroom.data.examples import Examples
from stillroom.data.prepare import PreparedData, load_prepared
from stillroom.distillation.cache_files import TeacherCache
from stillroom.distillation.dense_student import dense_student
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.narrow import Width, narrow_student
from stillroom.distillation.student import choose_layers, initialise_student, load_student
from stillroom.models import load_tokenizer
from tasks.work.bench import Bench, Result
from tasks.work.training import save_trained, training_options


def work(bench: Bench) -> Result:
    """Write the student; without a cache it learns from the text alone."""
    section, inputs = bench.section, bench.inputs
    data = load_prepared(inputs["data"])
    student = _initial_student(bench, data)
    options = DistillationOptions(
        training=training_options(bench),
        soft_weight=section["soft_weight"],
        hard_weight=section["hard_weight"],
        temperature=section["temperature"],
        divergence=section["divergence"],
        cosine_weight=section["cosine_weight"],
    )
    history = distill(
        student,
        _taught(bench, data.train, "cache"),
        options,
        evaluation=_taught(bench, data.evaluation, "evaluation_cache"),
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    tokenizer = load_tokenizer(inputs["teacher"])
    return save_trained(bench, student, tokenizer, data, history, bench.licence("teacher"))


def _taught(bench: Bench, examples: Examples, role: str) -> Taught:
    return Taught(examples, TeacherCache.open(bench.inputs[role]) if role in bench.inputs else None)


def _initial_student(bench: Bench, data: PreparedData) -> PreTrainedModel:
    """Return the student before it learns."""
    section = bench.section["student"]
    student = _of_fewer_layers(bench, data)
    width = Width(**{field.name: section[field.name] for field in fields(Width)})
    return student if width == Width() else narrow_student(student, width, data.calibration)


def _of_fewer_layers(bench: Bench, data: PreparedData) -> PreTrainedModel:
    """Return the student as wide as its teacher; of a dense one only its own layers are read."""
    section, folder = bench.section["student"], bench.inputs["teacher"]
    if section["experts"]:
        teacher = bench.load(folder)
        teacher = dense_student(teacher, section["experts"], data.calibration)
        return initialise_student(teacher, _layers(section, teacher))
    teacher, blocks = bench.open_streamed(folder)
    return load_student(teacher, blocks, _layers(section, teacher))


def _layers(section: dict[str, Any], teacher: PreTrainedModel) -> tuple[int, ...]:
    layers = section["layers"]
    if isinstance(layers, int):
        return choose_layers(len(find_blocks(teacher)[1]), layers, section["rule"])
    return tuple(layers)
