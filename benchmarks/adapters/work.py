"""The fixed work: MiniLM, dense and in 4 bits, and phrases of SST-2 split by sentence."""

import json
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters.methods import Method
from benchmarks.adapters.places import bench_folder, cell_path
from benchmarks.phrases import Example
from benchmarks.sst2 import BATCH, NAMES, as_rows, correct, glue_examples, split
from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.training import train_adapter
from stillroom.builtin import import_builtin
from stillroom.data.examples import Examples
from stillroom.models import load_model, load_pretrained, load_tokenizer, save_model
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.precision import MatmulPrecision
from stillroom.quantization.sequential import quantize_model
from stillroom.training.options import TrainingOptions

SEEDS = (0, 1, 2)
TRAIN_EXAMPLES = 4_000
PASSES = 3
TEST_EXAMPLES = 8_000
CALIBRATION_EXAMPLES = 512
BITS = 4
WORDS = 30_000
PRECISION: MatmulPrecision = "medium"  # bfloat16 products where the processor has them
BASES = ("fp32", f"{BITS} bits")


@cache
def train_rows(count: int = TRAIN_EXAMPLES, skipped: int = 0) -> Examples:
    """Return so many training phrases, drawn once and for all."""
    drawn = random.Random(1).sample(split(TEST_EXAMPLES)[0], skipped + count)
    return as_rows(drawn[skipped:], base_folder("fp32"))


def test_examples() -> list[Example]:
    """Return the phrases of other sentences that every model is measured on."""
    return split(TEST_EXAMPLES)[1]


@cache
def test_rows() -> Examples:
    """Return the test phrases as rows of tokens."""
    return as_rows(test_examples(), base_folder("fp32"))


@cache
def glue_rows() -> Examples:
    """Return GLUE's 872 sentences."""
    return as_rows(glue_examples(), base_folder("fp32"))


def random_rows(length: int) -> Examples:
    """Return a batch of random words of MiniLM's, full to the last place."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, WORDS, (BATCH, length), generator=generator)
    labels = torch.randint(0, len(NAMES), (BATCH,), generator=generator)
    return Examples(ids, torch.ones_like(ids), labels, torch.arange(BATCH), "", NAMES)


@cache
def base_folder(base: str) -> Path:
    """Return the folder of MiniLM with a new head, dense or in 4 bits, made if it is absent."""
    folder = bench_folder() / f"minilm {base}".replace(" ", "-")
    if (folder / "config.json").exists():
        return folder
    if base == "fp32":
        shipped = bench_folder() / "minilm"
        import_builtin("minilm", shipped)
        torch.manual_seed(0)
        model = load_pretrained(shipped, task="sequence_classification", label_names=NAMES)
        save_model(model, load_tokenizer(shipped), folder)
        return folder
    dense = load_model(base_folder("fp32"), task="sequence_classification")
    calibration = train_rows(CALIBRATION_EXAMPLES, TRAIN_EXAMPLES)
    options = QuantizationOptions(bits=BITS, batch_rows=BATCH)
    result = quantize_model(dense, calibration, options)
    save_quantized(dense, load_tokenizer(base_folder("fp32")), result, folder)
    return folder


def load_base(base: str) -> Any:
    """Return the base; what is quantized stays packed."""
    return load_model(base_folder(base), task="sequence_classification", weights="packed")


def training(method: Method, seed: int, **changes: Any) -> TrainingOptions:
    """Return how every method is trained, but for its learning rate."""
    usual: dict[str, Any] = {"epochs": float(PASSES), "batch_rows": BATCH, "schedule": "linear"}
    usual |= {"bucket_by_length": True, "learning_rate": method.learning_rate, "seed": seed}
    usual |= {"checkpoint_every_steps": 10_000}  # none: a cell is done in minutes
    return TrainingOptions(**(usual | changes))


def fresh(method: Method, base: str, seed: int, device: str = "cpu") -> AdaptedModel:
    """Return the base wearing an adapter that has learned nothing."""
    adapted = AdaptedModel(load_base(base).to(device))
    adapted.add("a", method.options, task="sequence_classification", seed=seed)
    return adapted


def result_of(method: Method, base: str, seed: int) -> dict[str, Any]:
    """Return what a training of the table came to, which is done if it was not."""
    path = cell_path(f"sst2 {base} {method.name} {seed}".replace(" ", "-").replace(",", ""))
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    adapted = fresh(method, base, seed)
    began = time.perf_counter()
    train_adapter(adapted, "a", train_rows(), training(method, seed))
    seconds = time.perf_counter() - began
    found = {
        "trained": count_trained(adapted),
        "right": correct(adapted, test_rows()),
        "glue": correct(adapted, glue_rows()),
        "seconds": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    accuracy = 100 * sum(found["right"]) / len(found["right"])
    print(f"{base}, {method.name}, seed {seed}: {accuracy:.2f} % in {seconds:.0f} s", flush=True)
    return found


def count_trained(adapted: AdaptedModel) -> int:
    """Return the adapter's parameters, without its head, which every method has."""
    worn = adapted.worn("a")
    return sum(p.numel() for p in worn.method.parameters())
