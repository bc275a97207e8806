import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    models,
)
from transformers import (
    PreTrainedTokenizerFast,
)

from stillroom import vocabulary
from stillroom.builtin import import_builtin
from stillroom.errors import RecipeError
from stillroom.models import load_model, load_tokenizer, save_model, tokenizer_hash
from stillroom.vocabulary import trim_vocabulary, used_words, words_to_keep
from tests.stillroom.tiny import tiny_bert_masked, tiny_tokenizer
from tests.stillroom.trained_tokenizers import (
    CORPUS,
    KINDS,
    OTHER,
    assert_same_cut,
    cut,
    ids,
    logits,
    trained,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_kept_words_is_cut_as_before(kind: str) -> None:
    old = trained(kind)
    keep = words_to_keep(old, used_words(old, CORPUS[:2]))
    new = cut(old, keep)
    assert len(new) == len(keep) < len(old)
    assert tokenizer_hash(new) != tokenizer_hash(old)
    assert assert_same_cut(old, new, keep, [*CORPUS[:4], *OTHER]) >= 3
    for name in ("model_max_length", "padding_side", "chat_template", "special_tokens_map"):
        assert getattr(new, name) == getattr(old, name)
    assert keep[new.pad_token_id] == old.pad_token_id
    pair = new("the dog", "a fox")["input_ids"]
    assert [keep[index] for index in pair] == old("the dog", "a fox")["input_ids"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    words=st.sets(st.integers(0, 399)),
    text=st.lists(st.sampled_from([*" ,.".join(CORPUS[:4]).split(), " ", "\n", "é", "ø"])).map(
        "".join
    )
    | st.text(max_size=30),
)
def test_any_choice_of_words_cuts_any_text_as_promised(
    kind: str, words: set[int], text: str
) -> None:
    old = trained(kind)
    keep = words_to_keep(old, dict.fromkeys((word for word in words if word < len(old)), 1))
    new = cut(old, keep)
    assert_same_cut(old, new, keep, [text])
    assert words_to_keep(old, dict.fromkeys(keep, 1)) == keep


def test_the_words_that_merges_pass_through_are_kept() -> None:
    # "abc" is made of "ab" and "c", and is not found again without "ab".
    backend = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(["a", "b", "c", "ab", "bc", "abc"])},
            merges=[("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],
        )
    )
    old = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=None, eos_token=None)
    keep = words_to_keep(old, used_words(old, ["abc"]))
    # "bc" makes "abc" as well, but never comes first.
    assert keep == [0, 1, 2, 3, 5]
    assert ids(cut(old, keep), "abc") == [4]
    with pytest.raises(RecipeError, match=r"pass through.*'ab'"):
        cut(old, [0, 1, 2, 5])


def test_words_below_the_minimum_go() -> None:
    old = trained("bpe")
    counts = used_words(old, CORPUS)
    assert counts[old.convert_tokens_to_ids("Ġtoo")] == 4
    few, many = words_to_keep(old, counts, minimum=5), words_to_keep(old, counts)
    assert set(few) < set(many)
    assert old.convert_tokens_to_ids("Ġtoo") not in few
    assert {old.pad_token_id, old.mask_token_id, old.convert_tokens_to_ids("<tool>")} <= set(few)


def test_a_word_whose_character_has_no_word_of_its_own_stays() -> None:
    words = ["<unk>", "a", "##a", "b", "##bz", "##ab"]
    backend = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    old = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert words_to_keep(old, {}) == [0, 1, 2, 3, 4, 5]


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(RecipeError, match="BPE, WordPiece or Unigram, WordLevel came"):
        words_to_keep(tiny_tokenizer(), {})
    with pytest.raises(RecipeError, match="expected a fast tokenizer, object came"):
        words_to_keep(object(), {})


def test_ids_that_are_no_words_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"\[10000\] came"):
        words_to_keep(trained("bpe"), {10_000: 1})


@pytest.mark.parametrize("wrong", ["short", "reversed", "twice"])
def test_a_list_that_words_to_keep_did_not_make_is_refused(wrong: str) -> None:
    tokenizer = trained("bpe")
    keep = words_to_keep(tokenizer, {})
    lists = {"short": keep[1:], "reversed": keep[::-1], "twice": [keep[0], *keep]}
    with pytest.raises(RecipeError, match="pass what words_to_keep returns"):
        cut(tokenizer, lists[wrong])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    import_builtin("smollm2", folder)
    return folder


def source_lines(*names: str) -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [
        line
        for name in names
        for line in (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    ]


def test_python_s_documentation_needs_a_seventh_of_smollm2_s_words(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = list(pydoc_data.topics.topics.values())
    old_model, old = load_model(smollm2), load_tokenizer(smollm2)
    chat = [{"role": "user", "content": "What does the import statement do?"}]
    text = old.apply_chat_template(chat, tokenize=False)
    counts = used_words(old, [*topics, text])
    keep = words_to_keep(old, counts)
    assert 4_000 < len(counts) < len(keep) < 10_000
    # The words that merges pass through are many, and single bytes only 235.
    assert len(keep) - len(counts) > 1_000

    model, tokenizer = trim_vocabulary(old_model, old, keep)
    seen = [line for topic in topics for line in topic.splitlines(keepends=True)]
    assert assert_same_cut(old, tokenizer, keep, topics) == len(topics)
    held_out = source_lines("argparse.py", "heapq.py", "this.py", "stringprep.py")
    assert 0.3 < assert_same_cut(old, tokenizer, keep, held_out) / len(held_out) < 1
    assert_same_cut(old, tokenizer, keep, [*seen, *OTHER])

    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    rows = [ids(old, text)], [ids(tokenizer, text)]
    new_logits = logits(model, rows[1])
    assert torch.equal(new_logits, logits(old_model, rows[0], keep))
    torch.testing.assert_close(new_logits, logits(old_model, rows[0])[..., keep], rtol=0, atol=1e-4)
    save_model(model, tokenizer, tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    saved = [(folder / "model.safetensors").stat().st_size for folder in (smollm2, tmp_path)]
    per_word = 4 * model.config.hidden_size
    assert saved[0] - saved[1] == pytest.approx((49_152 - len(keep)) * per_word, abs=1024)

    # Without the words that merges pass through, the used ones are not found again.
    monkeypatch.setattr(vocabulary, "_passed_through", lambda words, model: set())
    fewer = words_to_keep(old, counts)
    assert set(counts) <= set(fewer) < set(keep)
    broken = cut(old, fewer)
    wrong = [line for line in seen if [fewer[i] for i in ids(broken, line)] != ids(old, line)]
    assert len(wrong) > len(seen) / 2


def test_minilm_s_tokenizer_is_cut_and_read_again(tmp_path: Path) -> None:
    import_builtin("minilm", tmp_path / "old")
    old = load_tokenizer(tmp_path / "old")
    topics = list(pydoc_data.topics.topics.values())[::8]
    keep = words_to_keep(old, used_words(old, topics))
    assert len(keep) < 6_000
    model: Any = tiny_bert_masked(vocab=len(old))
    new_model, new = trim_vocabulary(model, old, keep)
    save_model(new_model, new, tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    lines = [*topics, *source_lines("heapq.py", "this.py"), *OTHER]
    assert assert_same_cut(old, again, keep, lines) > len(topics)
    assert [again(line)["input_ids"] for line in OTHER] == [
        new(line)["input_ids"] for line in OTHER
    ]
    assert tokenizer_hash(again) == tokenizer_hash(new) != tokenizer_hash(old)
