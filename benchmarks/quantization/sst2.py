"""MiniLM on SST-2: what 8, 4 and 3 bits cost in accuracy."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims import Claim, at_most
from benchmarks.comparison import Estimate
from benchmarks.phrases import Example, clustered_loss, read_examples, split_by_sentence
from benchmarks.places import data_folder
from benchmarks.quantization.measures import keep
from benchmarks.quantization.places import bench_folder

TRAIN_EXAMPLES = 30_000
CALIBRATION_EXAMPLES = 512
BATCH = 32
LEARNING_RATE = 1e-4
LENGTH = 64  # tokens, longer sentences are cut
BITS = (8, 4, 3)
UPPER = 1.96  # standard errors


@dataclass(frozen=True)
class Tokens:
    """A batch, (rows, length)."""

    input_ids: Tensor
    attention_mask: Tensor


def measure_sst2() -> None:
    """Fine-tune MiniLM once, quantize it at each number of bits, and compare on test phrases."""
    if not (data_folder() / "sst2").exists():
        return
    train, test = split_by_sentence(read_examples(data_folder() / "sst2"), random.Random(0))
    folder = _fine_tuned(train)
    dense = _correct(folder, test)
    results: dict[str, Any] = {"fp32": {"accuracy": sum(dense) / len(dense)}}
    losses: dict[int, Estimate] = {}
    for bits in BITS:
        for method in ("gptq", "rtn"):
            right = _correct(_quantized(folder, train, bits, method), test)
            losses_here = clustered_loss(dense, right, [each.sentence for each in test])
            results[f"{method}-{bits}"] = {
                "accuracy": sum(right) / len(right),
                "loss_points": losses_here.value,
                "standard_error": losses_here.standard_error,
            }
            if method == "gptq":
                losses[bits] = losses_here
    keep("sst2", [_claim(losses[4])], examples=len(test), results=results)


def _claim(loss: Estimate) -> Claim:
    text = "MiniLM on SST-2 at 4 bits: points lost, upper 95 % bound of the paired difference"
    return at_most(text, 0.5, loss.value + UPPER * loss.standard_error, loss.standard_error)


def _fine_tuned(train: list[Example]) -> Path:
    """Return the folder of MiniLM fine-tuned on the training phrases, made if it is absent."""
    from stillroom.builtin import import_builtin
    from stillroom.models import load_pretrained, load_tokenizer, save_model

    folder = bench_folder() / "minilm-sst2"
    if (folder / "config.json").exists():
        return folder
    shipped = bench_folder() / "minilm"
    import_builtin("minilm", shipped)
    torch.manual_seed(0)
    labels = ("negative", "positive")
    model = load_pretrained(shipped, task="sequence_classification", label_names=labels)
    tokenizer = load_tokenizer(shipped)
    chosen = random.Random(1).sample(train, min(TRAIN_EXAMPLES, len(train)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = -(-len(chosen) // BATCH)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        tokens = _tokens(tokenizer, batch)
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
        targets = torch.tensor([each.label for each in batch])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()
        falling.step()
    save_model(model.eval(), tokenizer, folder)
    return folder


def _quantized(folder: Path, train: list[Example], bits: Any, method: Any) -> Any:
    """Return the model in `folder` quantized in memory, calibrated on training phrases."""
    from stillroom.models import load_model, load_tokenizer
    from stillroom.quantization.options import QuantizationOptions
    from stillroom.quantization.sequential import quantize_model

    model = load_model(folder, task="sequence_classification")
    chosen = random.Random(2).sample(train, CALIBRATION_EXAMPLES)
    rows = _tokens(load_tokenizer(folder), chosen)
    quantize_model(model, rows, QuantizationOptions(bits=bits, method=method, batch_rows=BATCH))
    return model


@torch.no_grad()
def _correct(model: Any, test: list[Example]) -> list[bool]:
    """Return whether each test phrase is classified as labelled, by a model or one in a folder."""
    from stillroom.models import load_model, load_tokenizer

    if isinstance(model, Path):
        model = load_model(model, task="sequence_classification")
    tokenizer = load_tokenizer(bench_folder() / "minilm")
    order = sorted(range(len(test)), key=lambda i: len(test[i].text))
    right = [False] * len(test)
    for start in range(0, len(order), 4 * BATCH):
        places = order[start : start + 4 * BATCH]
        tokens = _tokens(tokenizer, [test[i] for i in places])
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
        for i, label in zip(places, logits.argmax(-1).tolist(), strict=True):
            right[i] = label == test[i].label
    return right


def _tokens(tokenizer: Any, examples: list[Example]) -> Tokens:
    texts = [each.text for each in examples]
    found = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return Tokens(found["input_ids"], found["attention_mask"])
