"""SST-2 for classifiers: its phrases as rows of tokens, and what models get right of them."""

import math
import random
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.comparison import Estimate, mean_estimate
from benchmarks.phrases import Example, clustered_loss, read_examples, split_by_sentence
from benchmarks.places import data_folder
from stillroom.data.examples import Examples
from stillroom.models import load_tokenizer, tokenizer_hash

NAMES = ("negative", "positive")
LENGTH = 64  # tokens, longer phrases are cut
BATCH = 32

Right = list[list[bool]]
"""For each seed, of each test phrase whether it is classified as it is labelled."""


def has_sst2() -> bool:
    """Return whether SST-2 is at hand."""
    return (data_folder() / "sst2").exists()


@cache
def split(test_examples: int) -> tuple[list[Example], list[Example]]:
    """Return training and at least so many test phrases, which share no sentence."""
    return split_by_sentence(read_examples(data_folder() / "sst2"), random.Random(0), test_examples)


def glue_examples() -> list[Example]:
    """Return GLUE's 872 sentences."""
    lines = (data_folder() / "sst2" / "test.tsv").read_text().splitlines()[1:]
    pairs = [line.rpartition("\t") for line in lines]
    return [
        Example(text.strip(), int(label), place) for place, (text, _, label) in enumerate(pairs)
    ]


def as_rows(examples: list[Example], model_folder: Path) -> Examples:
    """Return phrases as rows of a model's tokens, with their labels."""
    tokenizer = load_tokenizer(model_folder)
    found = tokenizer(
        [each.text for each in examples],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    labels = torch.tensor([each.label for each in examples])
    ids, mask = found["input_ids"], found["attention_mask"]
    documents = torch.arange(len(ids))
    return Examples(ids, mask, labels, documents, tokenizer_hash(tokenizer), label_names=NAMES)


@torch.no_grad()
def correct(model: Any, rows: Examples) -> list[bool]:
    """Return whether each row is classified as it is labelled."""
    model.eval()
    device = next(model.parameters()).device
    right = torch.zeros(len(rows), dtype=torch.bool)
    for places in rows.attention_mask.sum(1).argsort().split(4 * BATCH):
        part = rows.take(places).without_shared_padding()
        inputs = part.input_ids.to(device), part.attention_mask.to(device)
        logits = model(input_ids=inputs[0], attention_mask=inputs[1]).logits
        right[places] = logits.argmax(-1).cpu() == part.labels
    return right.tolist()  # type: ignore[no-any-return]


def points_lost(before: Right, after: Right, test: list[Example]) -> Estimate:
    """Return the accuracy lost in points, with the spread over sentences and over seeds.

    The error has two parts, added: the spread over sentences of what is lost in the mean of the
    seeds, and the spread over seeds of what is lost in the mean of all phrases.
    """
    sentences = [each.sentence for each in test]
    lost = clustered_loss(_means(before), _means(after), sentences)
    by_seed = [100 * (fmean(b) - fmean(a)) for b, a in zip(before, after, strict=True)]
    error = math.hypot(lost.standard_error, mean_estimate(by_seed).standard_error)
    return Estimate(lost.value, error)


def _means(right: Right) -> list[float]:
    """Return the share of seeds that classify each phrase as it is labelled."""
    return [fmean(seeds) for seeds in zip(*right, strict=True)]
