"""In how few dimensions MiniLM and a student of half its layers learn SST-2.

To see whether the larger model needs fewer (2012.13255, section 4.2). The student has learned no
task: it was taught the hidden states that MiniLM gives to text.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters.places import bench_folder, cell_path, measure_path
from benchmarks.adapters.work import (
    PRECISION,
    base_folder,
    test_examples,
    train_rows,
)
from benchmarks.claims import write_measure
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import BATCH, LENGTH, NAMES, as_rows, has_sst2
from benchmarks.text import text_source, texts
from stillroom.data.examples import Examples
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import choose_layers, initialise_student
from stillroom.distillation.teacher_cache import CacheOptions, capture
from stillroom.intrinsic_dimension.artifact import load_base
from stillroom.intrinsic_dimension.search import (
    Dimension,
    ModelSize,
    Search,
    Trial,
    conclude,
    next_trials,
)
from stillroom.intrinsic_dimension.trial import TrialOptions, run_trial
from stillroom.models import load_tokenizer, save_model, tokenizer_hash
from stillroom.training.options import TrainingOptions

TRAIN_EXAMPLES, TEST_EXAMPLES = 2_000, 2_000
SEARCH = Search(min_dimension=64, max_dimension=4096, grid_points=4, tolerance=2.5)
USUAL = {"epochs": 2.0, "batch_rows": BATCH, "schedule": "linear", "bucket_by_length": True}
OPTIONS = TrialOptions(
    full=TrainingOptions(learning_rate=1e-4, **USUAL),  # type: ignore[arg-type]
    subspace=TrainingOptions(learning_rate=1e-3, **USUAL),  # type: ignore[arg-type]
    projection="sparse",  # of so few columns, it costs less than Fastfood's blocks
)
TEACHER_LAYERS, STUDENT_LAYERS = 6, 3
STUDENT_ROWS = 1_536
MODELS = {"MiniLM, 6 layers": TEACHER_LAYERS, "its student, 3 layers": STUDENT_LAYERS}


def measure_dimension() -> None:
    """Search for both models' dimensions at once, trial beside trial, and keep their curves."""
    if not has_sst2():
        return
    for layers in MODELS.values():
        model_folder(layers)
    finished: dict[int, dict[Trial, float]] = {layers: {} for layers in MODELS.values()}
    sizes: dict[int, ModelSize] = {}
    while cells := [
        (layers, trial)
        for layers, scores in finished.items()
        for trial in next_trials(SEARCH, scores)
    ]:
        for (layers, trial), (score, size) in zip(
            cells, side_by_side(_score, cells, PRECISION), strict=True
        ):
            finished[layers][trial], sizes[layers] = score, size
    found = {
        name: conclude(SEARCH, finished[layers], sizes[layers]) for name, layers in MODELS.items()
    }
    write_measure(
        measure_path("dimension"),
        [],
        text=f"SST-2, the student {text_source()}",
        rows=[_row(name, each) for name, each in found.items()],
        curves={name: each.as_json()["curve"] for name, each in found.items()},
        percent=round(100 * SEARCH.share),
        seeds=len(SEARCH.seeds),
        largest=SEARCH.max_dimension,
        train_examples=TRAIN_EXAMPLES,
        examples=TEST_EXAMPLES,
    )


@cache
def model_folder(layers: int) -> Path:
    """Return the folder of MiniLM, or of its student with so many layers, made if it is absent."""
    base_folder("fp32")
    shipped = bench_folder() / "minilm"
    if layers == TEACHER_LAYERS:
        return shipped
    folder = bench_folder() / f"minilm-{layers}-layers"
    if (folder / "config.json").exists():
        return folder
    teacher = load_base(shipped, task="sequence_classification", label_names=NAMES).eval()
    student = initialise_student(teacher, choose_layers(TEACHER_LAYERS, layers))
    text = _text_rows()
    cached = capture(
        teacher,
        text,
        bench_folder() / "caches" / "hidden",
        CacheOptions(hidden_states="last", batch_rows=BATCH, rows_per_shard=256),
        tokenizer_hash=text.tokenizer_hash,
    )
    training = TrainingOptions(epochs=2.0, batch_rows=BATCH, learning_rate=3e-4, schedule="linear")
    options = DistillationOptions(training, soft_weight=0.0, cosine_weight=1.0)
    history = distill(student, Taught(text, cached), options)
    print(f"the student's loss: {history.loss[0]:.3f}, then {history.loss[-1]:.3f}", flush=True)
    save_model(student.base_model, load_tokenizer(shipped), folder)
    return folder


def _text_rows() -> Examples:
    tokenizer = load_tokenizer(bench_folder() / "minilm")
    ids = tokenizer(texts()[0], verbose=False, return_tensors="pt")["input_ids"][0]
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    chosen = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    chosen = chosen[:STUDENT_ROWS].clone()
    labels, places = torch.zeros(len(chosen), dtype=torch.long), torch.arange(len(chosen))
    ones = torch.ones_like(chosen)
    return Examples(chosen, ones, labels, places, tokenizer_hash(tokenizer), label_names=NAMES)


def _score(layers: int, trial: Trial) -> tuple[float, ModelSize]:
    """Return what a trial came to, which is run if it was not, and the model's size."""
    path = cell_path(f"dimension {layers} layers {trial.name}".replace(" ", "-"))
    if not path.exists():
        base = load_base(
            model_folder(layers),
            task="sequence_classification",
            label_names=NAMES,
            head_seed=trial.seed,
        )
        outcome = run_trial(trial, base, (train_rows(TRAIN_EXAMPLES), _test_rows()), OPTIONS)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"score": outcome.score, "size": asdict(outcome.size)}))
        print(f"{layers} layers, {trial.name}: {100 * outcome.score:.2f} %", flush=True)
    found = json.loads(path.read_text())
    return found["score"], ModelSize(**found["size"])


@cache
def _test_rows() -> Examples:
    return as_rows(test_examples()[:TEST_EXAMPLES], base_folder("fp32"))


def _row(name: str, found: Dimension) -> dict[str, Any]:
    low, high = found.interval
    return {
        "model": name,
        "parameters": found.parameters,
        "full": 100 * found.full,
        "dimension": None if found.dimension is None else round(found.dimension),
        "low": None if low is None else round(low),
        "high": None if high is None else round(high),
        "lora_rank": found.lora_rank,
        "trials": found.trials,
    }
