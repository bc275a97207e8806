"""From documents to the three sets of rows that all stages read."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from stillroom.data.calibration import draw_calibration
from stillroom.data.clean import deduplicate, filter_documents, split_documents
from stillroom.data.documents import Document
from stillroom.data.examples import Examples, load_examples, save_examples
from stillroom.data.leaks import LeakRemoval, find_leaks, remove_leaks
from stillroom.data.tokens import (
    Tokenised,
    tokenise_causal,
    tokenise_classification,
    tokenise_masked,
)
from stillroom.errors import CorruptedError, DataError, SourceError
from stillroom.progress import Progress, silent

SETS = ("train", "evaluation", "calibration")
STATISTICS = "statistics.json"


@dataclass(frozen=True)
class PrepareOptions:
    """How documents become rows."""

    task: Literal["causal_lm", "masked_lm", "sequence_classification"] = "causal_lm"
    sequence_length: int = 512
    pack: bool = True
    masked_fraction: float = 0.15
    """Of a row's words, for masked_lm."""
    held_out_fraction: float = 0.1
    min_characters: int = 20
    max_characters: int = 10_000_000
    deduplicate: bool = True
    max_train_tokens: int | None = None
    max_evaluation_tokens: int | None = None
    calibration_rows: int = 128
    """0 for none."""
    leak_ngram: int = 13
    on_leak: Literal["drop", "fail"] = "drop"
    seed: int = 0


@dataclass(frozen=True)
class PreparedData:
    """Rows to learn from, to measure on and to calibrate with; the last are among the first.

    `statistics`: counts of documents, rows and tokens, and of what was left out on the way.
    """

    train: Examples
    evaluation: Examples
    calibration: Examples
    statistics: dict[str, float]


def prepare(
    options: PrepareOptions,
    train: list[Document],
    evaluation: list[Document] | None,
    tokenizer: Any,
    tokenizer_hash: str,
    progress: Progress = silent,
    *,
    label_order: Sequence[str] = (),
) -> PreparedData:
    """Return tokenised training, evaluation and calibration rows.

    In this order: filter, deduplicate, split (where no evaluation text is given), look for
    evaluation text in the training text, tokenise, cut to the token budgets, draw calibration
    rows from what is left of training.

    Labels take the places that they have in `label_order`, which is a model's own, where all of
    them are in it; else they are sorted, numbers by value.

    Raises:
        DataError: too little text is left at one of the steps, labels do not fit, or, with
            on_leak "fail", evaluation text stands in the training text.
    """
    statistics: dict[str, float] = {"documents": len(train) + len(evaluation or [])}
    with _naming("train"):
        kept_train = _clean(train, options, statistics)
    if evaluation is None:
        _require_one_row(kept_train, options, tokenizer, tokenizer_hash)
        kept_train, kept_evaluation = split_documents(
            kept_train, options.held_out_fraction, options.seed
        )
    else:
        with _naming("evaluation"):
            kept_evaluation = _clean(evaluation, options, statistics)
    kept_train = _without_leaks(kept_train, kept_evaluation, options, statistics)
    label_names = _label_names(kept_train, options, label_order)
    sets = {}
    for name, documents, budget in (
        ("train", kept_train, options.max_train_tokens),
        ("evaluation", kept_evaluation, options.max_evaluation_tokens),
    ):
        with _naming(name):
            tokenised = _tokenise(
                documents, options, label_names, tokenizer, tokenizer_hash, progress
            )
        sets[name] = _within_budget(tokenised.examples, budget, options.seed, name)
        statistics[f"{name}_documents"] = len(documents)
        statistics[f"{name}_rows"] = len(sets[name])
        statistics[f"{name}_tokens"] = sets[name].tokens
        statistics[f"{name}_tokens_over_budget"] = tokenised.examples.tokens - sets[name].tokens
        statistics[f"{name}_tokens_truncated"] = tokenised.truncated_tokens
        statistics[f"{name}_rows_without_loss"] = tokenised.rows_without_loss
    calibration = draw_calibration(sets["train"], options.calibration_rows, options.seed)
    statistics["calibration_rows"] = len(calibration)
    return PreparedData(sets["train"], sets["evaluation"], calibration, statistics)


def save_prepared(data: PreparedData, folder: Path) -> None:
    """Write the three sets and the statistics below `folder`; the same data give the same bytes."""
    for name in SETS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_examples(getattr(data, name), folder / name)
    text = json.dumps(data.statistics, indent=2, sort_keys=True) + "\n"
    (folder / STATISTICS).write_text(text, encoding="utf-8")


def load_prepared(folder: Path, expected_tokenizer_hash: str | None = None) -> PreparedData:
    """Read what `save_prepared` wrote, and verify it.

    Raises:
        SourceError, CorruptedError, MismatchError: as `load_examples`.
    """
    path = folder / STATISTICS
    if not path.is_file():
        raise SourceError(f"prepared data expected in {folder}: {STATISTICS} is not there")
    try:
        statistics = {str(k): float(v) for k, v in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise CorruptedError(f"numbers expected in {path}: {error}; prepare again") from error
    train, evaluation, calibration = (
        load_examples(folder / name, expected_tokenizer_hash) for name in SETS
    )
    return PreparedData(train, evaluation, calibration, statistics)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have an error say which of the texts it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"the {name} text: {error}") from error


def _clean(
    documents: list[Document], options: PrepareOptions, statistics: dict[str, float]
) -> list[Document]:
    kept = filter_documents(documents, options.min_characters, options.max_characters)
    _add(statistics, "documents_outside_length", len(documents) - len(kept))
    if options.deduplicate:
        unique = deduplicate(kept)
        _add(statistics, "duplicates_removed", len(kept) - len(unique))
        kept = unique
    return kept


def _add(statistics: dict[str, float], name: str, value: float) -> None:
    statistics[name] = statistics.get(name, 0) + value


def _require_one_row(
    documents: list[Document], options: PrepareOptions, tokenizer: Any, tokenizer_hash: str
) -> None:
    """Say that the text is short before the split says that it cannot be split."""
    # No token is longer than this on average: above it the text fills a row for certain.
    long_enough = 64 * options.sequence_length
    packed = options.task != "sequence_classification" and options.pack
    if packed and sum(len(document.content) for document in documents) < long_enough:
        _tokenise(documents, options, (), tokenizer, tokenizer_hash)


def _without_leaks(
    train: list[Document],
    evaluation: list[Document],
    options: PrepareOptions,
    statistics: dict[str, float],
) -> list[Document]:
    ngram = options.leak_ngram
    if options.on_leak == "fail":
        leaked = find_leaks(train, evaluation, ngram=ngram).leaked
        if leaked:
            raise DataError(
                f"evaluation text apart from the training text expected: {len(leaked)} of "
                f"{len(evaluation)} evaluation documents share {ngram} words in a row with it, "
                f"the first {evaluation[leaked[0]].title}; set on_leak to drop, or change the text"
            )
        removal = LeakRemoval(0, 0, 0, 0)
    else:
        train, removal = remove_leaks(train, evaluation, ngram=ngram)
    statistics["leaked_evaluation_documents"] = removal.evaluation_documents
    statistics["leaked_documents_removed"] = removal.documents
    statistics["leaked_paragraphs_removed"] = removal.paragraphs
    statistics["leaked_characters_removed"] = removal.characters
    return train


def _label_names(
    train: list[Document], options: PrepareOptions, label_order: Sequence[str]
) -> tuple[str, ...]:
    if options.task != "sequence_classification":
        return ()
    found = {document.label for document in train if document.label is not None}
    labels = sorted(found, key=_by_value)
    if len(labels) < 2:
        raise DataError(
            f"two labels or more expected for classification: {', '.join(labels) or 'none'} came; "
            "name the label column, or set on_leak and the filters so that labels are left"
        )
    return _in_order(labels, label_order)


def _in_order(labels: Sequence[str], label_order: Sequence[str]) -> tuple[str, ...]:
    """Return a teacher's order of these labels, spelled as they are; theirs where it lacks one."""
    own = {label.casefold(): label for label in labels}
    known = [name.casefold() for name in label_order]
    if len(own) == len(labels) and own.keys() <= set(known):
        return tuple(own.get(folded, name) for folded, name in zip(known, label_order, strict=True))
    numbers = tuple(map(str, range(len(label_order))))
    return numbers if set(labels) <= set(numbers) else tuple(labels)


def _by_value(label: str) -> tuple[bool, int, str]:
    number = re.fullmatch("-?[0-9]+", label)
    return number is None, int(label) if number else 0, label


def _tokenise(
    documents: list[Document],
    options: PrepareOptions,
    label_names: tuple[str, ...],
    tokenizer: Any,
    tokenizer_hash: str,
    progress: Progress = silent,
) -> Tokenised:
    length = options.sequence_length
    match options.task:
        case "causal_lm":
            return tokenise_causal(
                documents,
                tokenizer,
                length,
                pack=options.pack,
                tokenizer_hash=tokenizer_hash,
                progress=progress,
            )
        case "masked_lm":
            return tokenise_masked(
                documents,
                tokenizer,
                length,
                pack=options.pack,
                masked_fraction=options.masked_fraction,
                seed=options.seed,
                tokenizer_hash=tokenizer_hash,
                progress=progress,
            )
        case "sequence_classification":
            return tokenise_classification(
                documents,
                tokenizer,
                length,
                label_names,
                tokenizer_hash=tokenizer_hash,
                progress=progress,
            )


def _within_budget(examples: Examples, budget: int | None, seed: int, name: str) -> Examples:
    """Return rows drawn from all documents whose tokens together stay within the budget."""
    if budget is None or examples.tokens <= budget:
        return examples
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator)
    tokens = examples.attention_mask.sum(dim=1)[order]  # (rows,)
    drawn = order[tokens.cumsum(dim=0) <= budget]
    if len(drawn) == 0:
        raise DataError(
            f"a token budget of one row or more expected: max_{name}_tokens is {budget}, a row "
            f"has {int(tokens[0])} tokens; raise it"
        )
    return examples.take(drawn.sort().values)
