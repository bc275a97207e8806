"""Filtering, deduplication, splitting, and evaluation text in the training text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.data.clean import deduplicate, filter_documents, split_documents
from stillroom.data.documents import Document
from stillroom.data.leaks import find_leaks, remove_leaks
from stillroom.errors import DataError

LETTERS = "abc"


def runs(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def texts(*contents: str) -> list[Document]:
    return [Document(text=content) for content in contents]


def test_filter_bounds_are_inclusive() -> None:
    documents = texts("ab", "abc", "abcde", "abcdef", "      ")
    assert filter_documents(documents, 3, 5) == documents[1:3]
    with pytest.raises(DataError, match="none of 5 has that length"):
        filter_documents(documents, 100, 200)


def test_deduplicate_looks_through_case_spaces_and_composition() -> None:
    documents = texts(
        "Caf\u00e9  one", "cafe\u0301 ONE\n", "other", "", "other\n\ncaf\u00e9 one", "o\n\nother"
    )
    assert deduplicate(documents) == [documents[0], documents[2], documents[5]]


def test_deduplicate_compares_conversations_whole() -> None:
    def chat(*contents: str) -> Document:
        return Document(messages=tuple({"role": "user", "content": c} for c in contents))

    documents = [chat("a", "b"), chat("b", "a"), chat("a", "b"), chat("a")]
    assert deduplicate(documents) == [documents[0], documents[1], documents[3]]


@settings(deadline=None, max_examples=50)
@given(
    families=st.lists(st.integers(0, 8), min_size=2, max_size=30),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 5),
)
def test_a_family_never_straddles(families: list[int], fraction: float, seed: int) -> None:
    documents = [Document(text=str(i), family=str(f)) for i, f in enumerate(families)]
    if len(set(families)) == 1:
        with pytest.raises(DataError, match="two independent documents"):
            split_documents(documents, fraction, seed)
        return
    train, held_out = split_documents(documents, fraction, seed)
    assert train
    assert held_out
    assert sorted(train + held_out, key=lambda d: int(d.text)) == documents
    assert not {d.family for d in train} & {d.family for d in held_out}
    assert split_documents(documents[::-1], fraction, seed)[1] == held_out[::-1]


def test_new_documents_do_not_reshuffle() -> None:
    documents = texts(*(str(i) for i in range(200)))
    before = set(split_documents(documents, 0.2, 7)[1])
    after = set(split_documents(documents + texts(*(f"new {i}" for i in range(20))), 0.2, 7)[1])
    assert len(before & after) > 30
    assert before != set(split_documents(documents, 0.2, 8)[1])


def test_a_split_leaves_every_label_in_training() -> None:
    documents = [Document(text=str(i), label="rare" if i == 3 else "common") for i in range(10)]
    for seed in range(10):
        assert {d.label for d in split_documents(documents, 0.5, seed)[0]} == {"rare", "common"}


@settings(deadline=None, max_examples=60)
@given(
    train=st.lists(
        st.lists(st.text(LETTERS, min_size=1, max_size=1), min_size=1, max_size=25),
        min_size=1,
        max_size=4,
    ),
    evaluation=st.lists(
        st.lists(st.text(LETTERS, min_size=1, max_size=1), min_size=4, max_size=12),
        min_size=1,
        max_size=3,
    ),
    breaks=st.integers(2, 6),
    share=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_no_run_of_a_leaked_document_is_left(
    train: list[list[str]], evaluation: list[list[str]], breaks: int, share: float
) -> None:
    n = 4
    learned = texts(
        *(
            "\n\n".join(" ".join(words[i : i + breaks]) for i in range(0, len(words), breaks))
            for words in train
        )
    )
    measured = texts(*(" ".join(words) for words in evaluation))
    there = set().union(*(runs(d.text, n) for d in learned))
    expected = [len(runs(d.text, n) & there) / len(runs(d.text, n)) for d in measured]
    report = find_leaks(learned, measured, ngram=n, share=share)
    assert report.shares == pytest.approx(expected)
    assert report.leaked == tuple(i for i, found in enumerate(expected) if found > share)
    forbidden = set().union(*(runs(measured[i].text, n) for i in report.leaked))
    try:
        kept, removal = remove_leaks(learned, measured, ngram=n, share=share)
    except DataError:
        assert all(runs(d.text, n) & forbidden for d in learned)
        return
    assert not any(runs(d.text, n) & forbidden for d in kept)
    assert removal.documents == len(learned) - len(kept)
    assert all(d in kept for d in learned if not runs(d.text, n) & forbidden)


def sentence(start: int) -> str:
    return " ".join(f"word{i}" for i in range(start, start + 20))


def test_only_the_touched_paragraph_goes() -> None:
    train = texts(f"{sentence(0)}\n\n{sentence(100)}\n\n{sentence(200)}", sentence(300))
    evaluation = texts(f"before {sentence(100).upper()}, after")
    kept, removal = remove_leaks(train, evaluation)
    assert [d.text for d in kept] == [f"{sentence(0)}\n\n{sentence(200)}", sentence(300)]
    assert (removal.documents, removal.paragraphs, removal.evaluation_documents) == (0, 1, 1)
    assert removal.characters == len(sentence(100)) + 2


def test_labelled_texts_and_conversations_go_whole() -> None:
    chat = (
        {"role": "system", "content": sentence(500)},
        {"role": "user", "content": sentence(100)},
    )
    train = [
        Document(text=f"{sentence(0)}\n\n{sentence(100)}", label="a"),
        Document(messages=chat),
        Document(text=sentence(500)),
    ]
    kept, removal = remove_leaks(train, [Document(messages=(chat[0], chat[1]))])
    assert kept == train[2:]
    assert removal.documents == 2


def test_short_evaluation_texts_leak_as_wholes_only() -> None:
    train = texts("A bonus!", "it is a bonus to have")
    kept, _ = remove_leaks(train, texts("a bonus", "an unrelated text"))
    assert kept == train[1:]
    assert find_leaks(train, texts("a bonus", "an unrelated text")).shares == (1.0, 0.0)


def test_boilerplate_is_no_leak() -> None:
    evaluation = texts(*(f"{sentence(0)} {sentence(100 * i)}" for i in range(1, 12)))
    train = texts(sentence(0), sentence(300))
    report = find_leaks(train, evaluation)
    assert report.boilerplate == 8
    assert report.leaked == (2,)
    family = [Document(text=d.text, family="one") for d in evaluation]
    assert find_leaks(train, family).leaked == tuple(range(11))


def test_characters_are_words_where_words_have_no_spaces() -> None:
    text = "蒸留室は大きな家の一室である"
    assert find_leaks(texts(f"序{text}終"), texts(text)).leaked == (0,)


def test_the_marks_of_a_script_part_no_words() -> None:
    text = "मैं आज बाजार गया और वहाँ से कुछ फल खरीदकर घर वापस आया"
    words = text.split()
    other = [f"कख{chr(0x915 + i)}" for i in range(13)]
    assert find_leaks(texts(text), texts(text)).leaked == (0,)
    few = " ".join([*words[:12], *other])
    assert find_leaks(texts(text), texts(few)).leaked == ()
    assert find_leaks(texts(f"{few} {text}"), texts(text)).leaked == (0,)


def test_nothing_left_to_learn_from_is_an_error() -> None:
    with pytest.raises(DataError, match="all 1 training documents hold runs of 13 words"):
        remove_leaks(texts(sentence(0)), texts(sentence(0)))
