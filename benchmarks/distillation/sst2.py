"""DistilBERT's claim on SST-2: half of MiniLM's layers, with and without the teacher."""

import random
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.claims import Claim, at_least, write_measure
from benchmarks.comparison import Estimate, mean_estimate
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import FULL
from benchmarks.phrases import Example, clustered_loss, read_examples, split_by_sentence
from benchmarks.places import data_folder
from stillroom.builtin import import_builtin
from stillroom.data.examples import Examples
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import choose_layers, initialise_student
from stillroom.distillation.teacher_cache import CacheOptions, TeacherCache, capture
from stillroom.fine_tuning import fine_tune
from stillroom.models import load_pretrained, load_tokenizer, tokenizer_hash
from stillroom.training.options import TrainingOptions

SEEDS = (0, 1, 2)
LABELS = ("negative", "positive")
TRAIN_EXAMPLES = 30_000 if FULL else 12_000
TEACHER_LAYERS, STUDENT_LAYERS = 6, 3
FEW = 2_000  # phrases with labels, where the others have none
LENGTH = 64  # tokens, longer phrases are cut
BATCH = 32
TEMPERATURE = 2.0
LOWER = -1.96  # standard errors
SPEED_ROUNDS = 7


@dataclass(frozen=True)
class Variant:
    """How a student is made."""

    taught: bool  # by the teacher's outputs, besides the labels
    initialised: bool  # with the teacher's layers

    @property
    def name(self) -> str:
        """Return it in words."""
        teacher = "teacher" if self.taught else "labels alone"
        return f"{teacher}, {'its layers' if self.initialised else 'random start'}"


VARIANTS = tuple(Variant(*each) for each in product((True, False), (True, False)))
OURS, ALONE = Variant(True, True), Variant(False, True)


def measure_sst2() -> None:
    """Fine-tune a teacher a seed, distil its students, and compare on held-out phrases."""
    if not (data_folder() / "sst2").exists():
        return
    train, test = split_by_sentence(read_examples(data_folder() / "sst2"), random.Random(0))
    chosen = _rows(random.Random(1).sample(train, TRAIN_EXAMPLES))
    right: dict[str, list[list[bool]]] = {}
    glue: dict[str, list[float]] = {}
    for seed in SEEDS:
        teacher = _teacher(chosen, seed)
        cached = _cache(teacher, chosen, seed)
        models = {"teacher": teacher} | {
            variant.name: _student(teacher, chosen, cached, variant, seed) for variant in VARIANTS
        }
        for name, model in models.items():
            right.setdefault(name, []).append(correct(model, _rows(test)))
            glue.setdefault(name, []).append(fmean(correct(model, _rows(_glue()))))
        print(f"seed {seed}", {name: fmean(each[-1]) for name, each in right.items()}, flush=True)
    speed = _speed_ratio(models["teacher"], models[OURS.name], _rows(test[:512]))
    sentences = [each.sentence for each in test]
    rows = [
        {
            "model": name,
            "parameters": sum(p.numel() for p in models[name].parameters()),
            "accuracy": 100 * fmean(map(fmean, each)),
            "lost": _lost(right["teacher"], each, sentences).value,
            "standard_error": _lost(right["teacher"], each, sentences).standard_error,
            "glue": 100 * fmean(glue[name]),
        }
        for name, each in right.items()
    ]
    claims = _claims(right, sentences, speed)
    facts = {
        "seeds": len(SEEDS),
        "examples": len(test),
        "train_examples": TRAIN_EXAMPLES,
        "speed": speed,
    }
    write_measure(measure_path("sst2"), claims, text="SST-2", rows=rows, **facts)


def measure_few_labels() -> None:
    """Compare the same students where few phrases have labels: a teacher can label the others.

    The teacher learns from the few; its student from what it says of all phrases, without a label;
    the student without a teacher from the few, in as many steps.
    """
    if not (data_folder() / "sst2").exists():
        return
    train, test = split_by_sentence(read_examples(data_folder() / "sst2"), random.Random(0))
    chosen = _rows(random.Random(1).sample(train, TRAIN_EXAMPLES))
    few = chosen.take(torch.arange(FEW))
    passes = TRAIN_EXAMPLES / FEW
    right: dict[str, list[list[bool]]] = {}
    glue: dict[str, list[float]] = {}
    for seed in SEEDS:
        teacher = _teacher(few, seed, passes)
        cached = _cache(teacher, chosen, seed, "sst2-few")
        models = {
            "teacher": teacher,
            OURS.name: _student(teacher, chosen, cached, OURS, seed),
            ALONE.name: _student(teacher, few, cached, ALONE, seed, passes),
        }
        for name, model in models.items():
            right.setdefault(name, []).append(correct(model, _rows(test)))
            glue.setdefault(name, []).append(fmean(correct(model, _rows(_glue()))))
        print(f"seed {seed}", {name: fmean(each[-1]) for name, each in right.items()}, flush=True)
    sentences = [each.sentence for each in test]
    gain = _lost(right[OURS.name], right[ALONE.name], sentences)
    claim = at_least(
        f"SST-2, {FEW} labels and {TRAIN_EXAMPLES - FEW} phrases without: points gained by the "
        "teacher, lower 95 % bound of the paired difference",
        0.0,
        gain.value + LOWER * gain.standard_error,
        gain.standard_error,
    )
    rows = [
        {
            "model": name,
            "accuracy": 100 * fmean(map(fmean, each)),
            "lost": _lost(right["teacher"], each, sentences).value,
            "standard_error": _lost(right["teacher"], each, sentences).standard_error,
            "glue": 100 * fmean(glue[name]),
        }
        for name, each in right.items()
    ]
    facts = {"seeds": len(SEEDS), "examples": len(test), "labels": FEW}
    write_measure(measure_path("few_labels"), [claim], text="SST-2", rows=rows, **facts)


@torch.no_grad()
def correct(model: Any, rows: Examples) -> list[bool]:
    """Return whether each row is classified as it is labelled."""
    model.eval()
    order = rows.attention_mask.sum(1).argsort()
    right = torch.zeros(len(rows), dtype=torch.bool)
    for places in order.split(4 * BATCH):
        part = rows.take(places).without_shared_padding()
        logits = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits
        right[places] = logits.argmax(-1) == part.labels
    return right.tolist()  # type: ignore[no-any-return]


def _claims(right: dict[str, list[list[bool]]], sentences: list[int], speed: float) -> list[Claim]:
    kept = fmean(map(fmean, right[OURS.name])) / fmean(map(fmean, right["teacher"]))
    gain = _lost(right[OURS.name], right[ALONE.name], sentences)
    return [
        at_least(
            "SST-2: share of the teacher's accuracy that the 3-layer student keeps", 0.97, kept
        ),
        at_least("SST-2: the 3-layer student's speed over its teacher's", 1.6, speed),
        at_least(
            "SST-2: points gained by the teacher, lower 95 % bound of the paired difference",
            0.0,
            gain.value + LOWER * gain.standard_error,
            gain.standard_error,
        ),
    ]


def _lost(before: list[list[bool]], after: list[list[bool]], sentences: list[int]) -> Estimate:
    """Return the accuracy lost in points, with the spread over sentences and over seeds."""
    by_seed = [clustered_loss(b, a, sentences) for b, a in zip(before, after, strict=True)]
    values = mean_estimate([each.value for each in by_seed])
    # Seeds share their test sentences, so that error does not shrink with their number.
    sentence_error = fmean(each.standard_error for each in by_seed)
    return Estimate(values.value, (values.standard_error**2 + sentence_error**2) ** 0.5)


def _teacher(rows: Examples, seed: int, passes: float = 1.0) -> Any:
    torch.manual_seed(seed)
    model = load_pretrained(_shipped(), task="sequence_classification", label_names=LABELS)
    fine_tune(model, rows, _training(seed, passes))
    return model.eval()


def _cache(teacher: Any, rows: Examples, seed: int, name: str = "sst2") -> TeacherCache:
    folder = bench_folder() / "caches" / f"{name}-{seed}"
    options = CacheOptions(
        kind="dense", temperature=TEMPERATURE, batch_rows=BATCH, rows_per_shard=4096
    )
    return capture(teacher, rows, folder, options, tokenizer_hash=rows.tokenizer_hash)


def _student(
    teacher: Any,
    rows: Examples,
    cached: TeacherCache,
    variant: Variant,
    seed: int,
    passes: float = 1.0,
) -> Any:
    student = initialise_student(teacher, choose_layers(TEACHER_LAYERS, STUDENT_LAYERS))
    if not variant.initialised:
        torch.manual_seed(seed)
        student = type(student)(student.config)
    options = DistillationOptions(_training(seed, passes), 1.0, 0.0, temperature=TEMPERATURE)
    distill(student, Taught(rows, cached if variant.taught else None), options)
    return student.eval()


def _training(seed: int, passes: float = 1.0) -> TrainingOptions:
    return TrainingOptions(
        epochs=passes,
        batch_rows=BATCH,
        learning_rate=1e-4,
        schedule="linear",
        seed=seed,
        bucket_by_length=True,
    )


def _speed_ratio(teacher: Any, student: Any, rows: Examples) -> float:
    """Return how many times as fast the student is, medians of interleaved runs."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(SPEED_ROUNDS):
        for is_teacher, model in ((True, teacher), (False, student)):
            began = time.perf_counter()
            correct(model, rows)
            seconds[is_teacher].append(time.perf_counter() - began)
    return median(seconds[True]) / median(seconds[False])


def _rows(examples: list[Example]) -> Examples:
    tokenizer = load_tokenizer(_shipped())
    found = tokenizer(
        [each.text for each in examples],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([each.label for each in examples])
    ids, mask = found["input_ids"], found["attention_mask"]
    return Examples(
        ids, mask, labels, torch.arange(len(ids)), tokenizer_hash(tokenizer), label_names=LABELS
    )


def _glue() -> list[Example]:
    lines = (data_folder() / "sst2" / "test.tsv").read_text().splitlines()[1:]
    pairs = [line.rpartition("\t") for line in lines]
    return [
        Example(text.strip(), int(label), place) for place, (text, _, label) in enumerate(pairs)
    ]


@cache
def _shipped() -> Path:
    folder = bench_folder() / "minilm"
    if not (folder / "config.json").exists():
        import_builtin("minilm", folder)
    return folder
