"""SST-2 split by sentence, and accuracy lost with its error clustered by sentence."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import Estimate, mean_estimate

TEST_EXAMPLES = 5000


@dataclass(frozen=True)
class Example:
    """A phrase, whether it is positive, and the test sentence that it is a part of."""

    text: str
    label: int
    sentence: int


def read_examples(folder: Path) -> list[tuple[str, int]]:
    """Return the phrases and labels of train.tsv and dev.tsv, which share sentences."""
    found: dict[str, int] = {}
    for name in ("train.tsv", "dev.tsv"):
        for line in (folder / name).read_text().splitlines()[1:]:
            text, _, label = line.rpartition("\t")
            found[text.strip()] = int(label)
    return list(found.items())


def split_by_sentence(
    examples: list[tuple[str, int]], chance: random.Random, wanted: int = TEST_EXAMPLES
) -> tuple[list[Example], list[Example]]:
    """Return training and test phrases; no training phrase is a part of a test sentence.

    SST's phrases are parts of sentences. A sentence here is a phrase of 15 words or more. Test
    sentences are drawn until they and the phrases in them are `wanted`; a phrase belongs to the
    first sentence that holds it.
    """
    sentences = [text for text, _ in examples if len(text.split()) >= 15]
    chance.shuffle(sentences)
    remaining = dict(examples)
    test: list[Example] = []
    for number, sentence in enumerate(sentences):
        if len(test) >= wanted:
            break
        for part in sorted(_runs_of_words(sentence) & remaining.keys()):
            test.append(Example(part, remaining.pop(part), number))
    train = [Example(text, label, -1) for text, label in remaining.items()]
    return train, test


def clustered_loss(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[int]
) -> Estimate:
    """Return the accuracy lost, in points, with the error of whole clusters drawn at random.

    before, after: for each phrase whether it was classified as labelled, or in what share of runs.
    """
    lost: dict[int, list[float]] = {}
    for b, a, cluster in zip(before, after, clusters, strict=True):
        lost.setdefault(cluster, []).append(b - a)
    mean = sum(map(sum, lost.values())) / len(before)
    deviations = [sum(each) - mean * len(each) for each in lost.values()]
    error = mean_estimate(deviations).standard_error * len(deviations) / len(before)
    return Estimate(100 * mean, 100 * error)


def _runs_of_words(sentence: str) -> set[str]:
    words = sentence.split()
    places = range(len(words))
    return {" ".join(words[i : j + 1]) for i in places for j in places[i:]}
