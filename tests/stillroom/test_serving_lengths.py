"""Texts that are longer than the served model reads are cut to fit, whatever limits it."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import LoraOptions, PrefixOptions, PromptOptions, PTuningOptions
from stillroom.contents import Contents
from stillroom.models import save_model
from stillroom.serving import ServedModel
from tests.stillroom.tiny import (
    seeded,
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_masked_tokenizer,
)

ADAPTERS = {
    "prompt_tuning": (PromptOptions(8), 8),
    "p_tuning": (PTuningOptions(((0, 4), (-1, 4))), 8),
    "prefix_tuning": (PrefixOptions(8), 0),
    "lora": (LoraOptions(2), 0),
}
LETTERS = "abcdefgh" * 25


def tiny_bloom():
    config = BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=3
    )
    return seeded(BloomForSequenceClassification, config)


def tiny_roberta():
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=34, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    return seeded(RobertaForSequenceClassification, config)


def served(model, folder, longest=None, task="sequence_classification"):
    tokenizer = tiny_masked_tokenizer()
    if longest is not None:
        tokenizer.model_max_length = longest
    save_model(model, tokenizer, folder)
    return ServedModel(folder, Contents("base", task, "a" * 64, "Apache-2.0", ()), {})


def scores(model, texts):
    return torch.tensor(model.predict(texts)["scores"].tolist())


def cut_to(count):
    """Return a text of `count` tokens, as the tokenizer cuts the long one: two are its marks."""
    return LETTERS[: count - 2]


@pytest.mark.parametrize("method", ADAPTERS)
def test_virtual_tokens_take_their_places_from_the_text(method, tmp_path):
    options, places = ADAPTERS[method]
    model = served(tiny_bert_classifier(), tmp_path)
    model.model = AdaptedModel(model.model)
    model.model.add("a", options, task="sequence_classification")
    model.model.eval()
    assert torch.equal(scores(model, [LETTERS]), scores(model, [cut_to(128 - places)]))
    assert not torch.equal(scores(model, [LETTERS]), scores(model, [cut_to(127 - places)]))


def test_virtual_tokens_take_their_places_from_a_text_to_fill(tmp_path):
    model = served(tiny_bert_masked(), tmp_path, task="masked_lm")
    model.model = AdaptedModel(model.model)
    model.model.add("a", PromptOptions(8), task="masked_lm")
    model.model.eval()
    assert model.predict(["[MASK]" + LETTERS]).equals(model.predict(["[MASK]" + LETTERS[:117]]))


def test_a_model_without_a_limit_reads_it_all(tmp_path):
    model = served(tiny_bloom(), tmp_path)
    assert not torch.equal(scores(model, [LETTERS]), scores(model, [LETTERS[:-1]]))


def test_a_tokenizers_limit_holds_where_the_model_has_none(tmp_path):
    model = served(tiny_bloom(), tmp_path, longest=20)
    assert torch.equal(scores(model, [LETTERS]), scores(model, [cut_to(20)]))


def test_positions_that_begin_behind_the_paddings_id_are_fewer(tmp_path):
    model = served(tiny_roberta(), tmp_path)
    assert torch.equal(scores(model, [LETTERS]), scores(model, [cut_to(32)]))
