"""A served masked language model names the hidden words of texts."""

import pytest
import torch

from stillroom.contents import Contents
from stillroom.errors import MismatchError, SourceError
from stillroom.models import load_model, save_model
from stillroom.serving import ServedModel
from tests.stillroom.tiny import tiny_bert_masked, tiny_masked_tokenizer

CONTENTS = Contents("base", "masked_lm", "a" * 64, "Apache-2.0", ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_bert_masked(vocab=60), tiny_masked_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return ServedModel(folder, CONTENTS, {})


def by_hand(folder, ids):
    """Return the likeliest word and its probability at each mask of one row of ids."""
    with torch.no_grad():
        logits = load_model(folder, task="masked_lm")(input_ids=torch.tensor([ids])).logits[0]
    shares = [logits[i].softmax(-1) for i, token in enumerate(ids) if token == 4]
    return [int(share.argmax()) for share in shares], [float(share.max()) for share in shares]


def test_every_mask_gets_its_word(folder, served):
    tokenizer = tiny_masked_tokenizer()
    texts = [f"{'abc'[i % 3] * (i + 1)}[MASK]x{'[MASK]' * (i % 2)}" for i in range(40)]
    answer = served.predict(texts)
    assert list(answer.columns) == ["filled", "words", "scores"]
    assert len(answer) == 40
    for text, (_, row) in zip(texts, answer.iterrows(), strict=True):
        ids = tokenizer(text)["input_ids"]
        words, scores = by_hand(folder, ids)
        assert row["words"] == tokenizer.convert_ids_to_tokens(words)
        assert row["scores"] == pytest.approx(scores, rel=1e-4)
        names = iter(words)
        whole = [next(names) if token == 4 else token for token in ids]
        assert row["filled"] == tokenizer.decode(whole, skip_special_tokens=True).strip()
        assert "[MASK]" not in row["filled"]


def test_a_tokenizer_with_another_mask_understands_the_same_texts(folder, served, tmp_path):
    tokenizer = tiny_masked_tokenizer(mask="<mask>")
    assert tokenizer.mask_token == "<mask>"
    save_model(load_model(folder, task="masked_lm"), tokenizer, tmp_path)
    other = ServedModel(tmp_path, CONTENTS, {})
    expected = served.predict("ab[MASK]d")
    for text in ("ab[MASK]d", "ab<mask>d"):
        assert other.predict(text).equals(expected)


def test_a_text_without_a_mask_or_with_one_too_far_out_is_refused(served):
    with pytest.raises(MismatchError, match=r"expected a text with \[MASK\] .* 'abc' came"):
        served.predict(["a[MASK]", "abc"])
    long = "a" * 125 + "[MASK]"
    assert len(served.predict(long)) == 1
    with pytest.raises(MismatchError, match=r"among the first 128 tokens.*text 1 has one later"):
        served.predict(["a[MASK]", "a" + long])


def test_a_bare_encoder_is_refused(folder, tmp_path):
    save_model(load_model(folder, task="masked_lm").bert, tiny_masked_tokenizer(), tmp_path)
    with pytest.raises(SourceError, match=r"a BertModel, which has no head .* teacher\.fine_tune"):
        load_model(tmp_path, task="masked_lm")
