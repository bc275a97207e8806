"""Make a student of some of the teacher's layers, and train it on what the teacher said."""

from transformers import PreTrainedModel

from stillroom.blocks import find_blocks
from stillroom.data.prepare import load_prepared
from stillroom.distillation.cache_files import TeacherCache
from stillroom.distillation.distill import DistillationOptions, distill
from stillroom.distillation.student import choose_layers, load_student
from stillroom.models import load_tokenizer
from tasks.work.bench import Bench, Result
from tasks.work.training import save_trained, training_options


def work(bench: Bench) -> Result:
    """Write the student; without a cache it learns from the text alone."""
    section, inputs = bench.section, bench.inputs
    data = load_prepared(inputs["data"])
    student = _initial_student(bench)
    options = DistillationOptions(
        training=training_options(bench),
        soft_weight=section["soft_weight"],
        hard_weight=section["hard_weight"],
        temperature=section["temperature"],
        divergence=section["divergence"],
    )
    history = distill(
        student,
        data.train,
        TeacherCache.open(inputs["cache"]) if "cache" in inputs else None,
        options,
        evaluation=data.evaluation,
        checkpoints=bench.checkpoints,
        fingerprint=bench.order.key,
        progress=bench.progress,
    )
    tokenizer = load_tokenizer(inputs["teacher"])
    return save_trained(bench, student, tokenizer, data, history, bench.licence("teacher"))


def _initial_student(bench: Bench) -> PreTrainedModel:
    """Return the student before it learns; of the teacher only its own layers are read."""
    teacher, blocks = bench.open_streamed(bench.inputs["teacher"])
    student = bench.section["student"]
    layers = student["layers"]
    if isinstance(layers, int):
        layers = choose_layers(len(find_blocks(teacher)[1]), layers, student["rule"])
    return load_student(teacher, blocks, tuple(layers))
