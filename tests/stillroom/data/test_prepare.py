"""Rows on disk, calibration, and the whole way from documents to rows."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import torch

from stillroom.data.calibration import draw_calibration
from stillroom.data.documents import Document
from stillroom.data.examples import Examples, load_examples, save_examples
from stillroom.data.prepare import PrepareOptions, load_prepared, prepare, save_prepared
from stillroom.errors import CorruptedError, DataError, MismatchError, SourceError
from tests.stillroom.tiny import tiny_tokenizer

OPTIONS = PrepareOptions(sequence_length=16, calibration_rows=4, held_out_fraction=0.2)


def rows(count: int = 6, length: int = 5, *, classes: bool = False) -> Examples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (count, length), generator=generator)
    return Examples(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.arange(count) % 2 if classes else ids,
        documents=torch.arange(count),
        tokenizer_hash="hash of a tokenizer",
        label_names=("x", "y") if classes else (),
    )


def documents(count: int = 30) -> list[Document]:
    """Return texts of words drawn at random, so that no run of words is shared."""
    draw = Random(0)
    return [
        Document(
            text=" ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(14 + i % 9)),
            label="even" if i % 2 == 0 else "odd",
            name=f"document {i}",
        )
        for i in range(count)
    ]


def equal(a: Examples, b: Examples) -> bool:
    names = ("input_ids", "attention_mask", "labels", "documents")
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return same and (a.tokenizer_hash, a.label_names) == (b.tokenizer_hash, b.label_names)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_take_and_hashes_follow_the_rows() -> None:
    examples = rows()
    chosen = examples.take(torch.tensor([4, 1]))
    assert chosen.documents.tolist() == [4, 1]
    assert chosen.row_hashes() == [examples.row_hashes()[4], examples.row_hashes()[1]]
    assert len(examples.take(slice(2, 5))) == 3
    values = [*examples.input_ids[0].tolist(), *examples.attention_mask[0].tolist()]
    expected = sha256(b"".join(v.to_bytes(8, "little", signed=True) for v in values)).hexdigest()
    assert examples.row_hashes()[0] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(6, 4, dtype=torch.int64)},
        {"labels": torch.zeros(6, dtype=torch.int64)},
        {"documents": torch.zeros(5, dtype=torch.int64)},
        {"documents": torch.zeros(6, dtype=torch.int32)},
    ],
)
def test_rows_that_do_not_fit_together_are_refused(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(MismatchError, match="expected"):
        replace(rows(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("examples", [rows(), rows(classes=True), rows().take(slice(0, 0))])
def test_saved_rows_come_back(tmp_path: Path, examples: Examples) -> None:
    save_examples(examples, tmp_path / "a")
    save_examples(examples, tmp_path / "b")
    assert equal(load_examples(tmp_path / "a", "hash of a tokenizer"), examples)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_saving_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_examples(rows(), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_rows_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    save_examples(rows(), tmp_path)
    with pytest.raises(MismatchError, match=r"tokenizer differs: .* hash of a to.* other"):
        load_examples(tmp_path, "other")


def test_missing_and_changed_rows_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="saved rows expected"):
        load_examples(tmp_path)
    save_examples(rows(), tmp_path)
    arrow = next(tmp_path.rglob("*.arrow"))
    whole = arrow.read_bytes()
    first = int(rows().input_ids[0, 0]).to_bytes(8, "little")
    at = whole.index(first + int(rows().input_ids[0, 1]).to_bytes(8, "little"))
    arrow.write_bytes(whole[:at] + bytes([63]) + whole[at + 1 :])
    with pytest.raises(CorruptedError, match="not those that were saved"):
        load_examples(tmp_path)
    arrow.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(CorruptedError, match="make them again"):
        load_examples(tmp_path)
    (tmp_path / "examples.json").write_text("{")
    with pytest.raises(CorruptedError):
        load_examples(tmp_path)


def test_calibration_is_seeded_and_without_replacement() -> None:
    examples = rows(20)
    drawn = draw_calibration(examples, 8, seed=1)
    assert len(set(drawn.documents.tolist())) == 8
    assert equal(drawn, draw_calibration(examples, 8, seed=1))
    assert not equal(drawn, draw_calibration(examples, 8, seed=2))
    assert equal(draw_calibration(examples, 20, seed=1), examples)
    with pytest.raises(DataError, match="21 rows to calibrate with expected: there are 20"):
        draw_calibration(examples, 21, seed=1)


def test_prepare_gives_disjoint_sets_and_counts() -> None:
    texts = documents()
    short, twice = Document(text="ab"), Document(text=texts[3].text.upper())
    data = prepare(OPTIONS, [*texts, short, twice], None, tiny_tokenizer(), "h")
    assert data.statistics["documents"] == 32
    assert data.statistics["documents_outside_length"] == 1
    assert data.statistics["duplicates_removed"] == 1
    assert data.statistics["evaluation_documents"] == 6
    assert data.statistics["train_tokens"] == data.train.tokens == 16 * len(data.train)
    assert not set(data.train.row_hashes()) & set(data.evaluation.row_hashes())
    assert set(data.calibration.row_hashes()) <= set(data.train.row_hashes())
    assert len(data.calibration) == 4


def test_prepare_is_deterministic_by_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data = prepare(replace(OPTIONS, seed=seed), documents(), None, tiny_tokenizer(), "h")
        save_prepared(data, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_prepared_data_come_back(tmp_path: Path) -> None:
    options = replace(OPTIONS, task="sequence_classification")
    data = prepare(options, documents(), None, tiny_tokenizer(), "h")
    save_prepared(data, tmp_path)
    loaded = load_prepared(tmp_path, "h")
    assert equal(loaded.train, data.train)
    assert equal(loaded.evaluation, data.evaluation)
    assert equal(loaded.calibration, data.calibration)
    assert loaded.statistics == data.statistics
    assert loaded.train.label_names == ("even", "odd")
    with pytest.raises(MismatchError, match="tokenizer differs"):
        load_prepared(tmp_path, "other")
    (tmp_path / "statistics.json").write_text(json.dumps([1]))
    with pytest.raises(CorruptedError, match="prepare again"):
        load_prepared(tmp_path)
    with pytest.raises(SourceError, match="prepared data expected"):
        load_prepared(tmp_path / "nowhere")


def test_budgets_draw_rows_from_all_documents() -> None:
    options = replace(OPTIONS, max_train_tokens=200, max_evaluation_tokens=50)
    data = prepare(options, documents(), None, tiny_tokenizer(), "h")
    assert (data.train.tokens, data.evaluation.tokens) == (192, 48)
    everything = prepare(OPTIONS, documents(), None, tiny_tokenizer(), "h")
    assert set(data.train.row_hashes()) < set(everything.train.row_hashes())
    assert data.train.documents.max() > everything.train.documents.max() // 2
    lost = data.statistics["train_tokens_over_budget"]
    assert lost == everything.train.tokens - data.train.tokens
    with pytest.raises(DataError, match="max_train_tokens is 10, a row has 16 tokens"):
        prepare(replace(options, max_train_tokens=10), documents(), None, tiny_tokenizer(), "h")


def test_unpacked_budgets_count_real_tokens() -> None:
    options = replace(OPTIONS, pack=False, sequence_length=200, max_train_tokens=500)
    data = prepare(options, documents(), None, tiny_tokenizer(), "h")
    assert 300 < data.train.tokens <= 500
    assert data.train.input_ids.numel() > data.train.tokens


def test_leaks_are_dropped_or_refused() -> None:
    texts = documents()
    train = [Document(text=d.text) for d in texts[:20]]
    evaluation = [*train[:1], *(Document(text=d.text) for d in texts[20:])]
    data = prepare(OPTIONS, train, evaluation, tiny_tokenizer(), "h")
    assert data.statistics["leaked_documents_removed"] == 1
    assert data.statistics["leaked_evaluation_documents"] == 1
    assert data.statistics["train_documents"] == 19
    with pytest.raises(DataError, match="1 of 11 evaluation documents share 13 words in a row"):
        prepare(replace(OPTIONS, on_leak="fail"), train, evaluation, tiny_tokenizer(), "h")


def test_a_text_of_less_than_a_row_is_said_first() -> None:
    with pytest.raises(DataError, match="text shorter than one sequence: 512 tokens needed"):
        prepare(
            replace(OPTIONS, sequence_length=512),
            [Document(text="a short text, all in one")],
            None,
            tiny_tokenizer(),
            "h",
        )


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("train", "short", "the train text: texts of 20 to"),
        ("evaluation", "short", "the evaluation text: texts of 20 to"),
        ("evaluation", "abcd efgh", "the evaluation text: text shorter than one seq"),
    ],
)
def test_what_is_too_short_is_said_of_its_text(name: str, text: str, match: str) -> None:
    texts = {"train": documents(), "evaluation": documents()} | {name: [Document(text=text)]}
    options = replace(OPTIONS, min_characters=20 if text == "short" else 1)
    with pytest.raises(DataError, match=match):
        prepare(options, texts["train"], texts["evaluation"], tiny_tokenizer(), "h")


def test_labels_must_be_there_and_known() -> None:
    options = replace(OPTIONS, task="sequence_classification")
    unlabelled = [Document(text=d.text) for d in documents()]
    with pytest.raises(DataError, match=r"two labels or more expected .*: none came"):
        prepare(options, unlabelled, None, tiny_tokenizer(), "h")
    strange = [Document(text="something else entirely", label="neither")]
    with pytest.raises(DataError, match=r"a label among even, odd expected .* neither came"):
        prepare(options, documents(), strange, tiny_tokenizer(), "h")


def test_no_calibration_may_be_asked_for() -> None:
    data = prepare(replace(OPTIONS, calibration_rows=0), documents(), None, tiny_tokenizer(), "h")
    assert len(data.calibration) == 0


def test_labels_take_the_places_of_a_model_that_knows_them() -> None:
    options = replace(OPTIONS, task="sequence_classification")

    def prepared(*order: str) -> Examples:
        return prepare(options, documents(), None, tiny_tokenizer(), "h", label_order=order).train

    known, all_three = prepared("odd", "even"), prepared("odd", "neither", "even")
    assert known.label_names == ("odd", "even")
    assert all_three.label_names == ("odd", "neither", "even")
    assert torch.equal(all_three.labels, 2 * known.labels)
    assert torch.equal(prepared().labels, 1 - known.labels)
    assert prepared("LABEL_0", "LABEL_1").label_names == ("even", "odd")
    assert prepared("Odd", "EVEN", "Neither").label_names == ("odd", "even", "Neither")


def test_numbers_are_classes_in_their_order() -> None:
    options = replace(OPTIONS, task="sequence_classification", held_out_fraction=0.1)
    texts = [replace(text, label=str(i % 12)) for i, text in enumerate(documents(120))]
    data = prepare(options, texts, None, tiny_tokenizer(), "h")
    assert data.train.label_names == tuple(str(i) for i in range(12))
    known = [f"LABEL_{i}" for i in range(13)]
    data = prepare(options, texts, None, tiny_tokenizer(), "h", label_order=known)
    assert data.train.label_names == tuple(str(i) for i in range(13))
