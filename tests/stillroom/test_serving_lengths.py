"""Texts that are longer than the served model reads are cut to fit, whatever limits it."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import stillroom.serving
from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import LoraOptions, PrefixOptions, PromptOptions, PTuningOptions
from stillroom.contents import Contents
from stillroom.errors import MismatchError
from stillroom.llama_engine import GGUF_FILE
from stillroom.models import save_model
from stillroom.serving import ServedModel
from tests.stillroom.quantization.formats.gguf_models import tiny_model
from tests.stillroom.tiny import (
    seeded,
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_masked_tokenizer,
    tiny_tokenizer,
)
from tests.stillroom.tiny_decoders import tiny_gpt2

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


def continuing(model, folder, adds_start=False):
    tokenizer = tiny_tokenizer()
    if adds_start:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    save_model(model, tokenizer, folder)
    (folder / GGUF_FILE).touch()
    contents = Contents("base", "causal_lm", "a" * 64, "Apache-2.0", ())
    return ServedModel(folder, contents, {"engine": "torch"})


def test_the_end_of_a_long_text_is_continued(tmp_path):
    model = continuing(tiny_gpt2(), tmp_path)
    answers = model.predict([LETTERS, "abc"], max_new_tokens=4)["generated"]
    assert answers[0] == model.predict([LETTERS[-61:]], max_new_tokens=4)["generated"][0]
    assert answers[1] == model.predict(["abc"], max_new_tokens=4)["generated"][0]
    model.predict(["a"], max_new_tokens=64)
    with pytest.raises(MismatchError, match="at most 64 new tokens, 65 came"):
        model.predict(["a"], max_new_tokens=65)


def test_the_token_that_begins_every_text_stays(tmp_path, monkeypatch):
    model = continuing(tiny_gpt2(), tmp_path, adds_start=True)
    read = []
    monkeypatch.setattr(model, "_continue_in_torch", lambda ids, count: read.append(ids) or [])
    model.predict([LETTERS], max_new_tokens=4)
    assert read == [[1, *tiny_tokenizer()(LETTERS[-60:])["input_ids"]]]
    with pytest.raises(MismatchError, match="at most 63 new tokens, 64 came"):
        model.predict(["a"], max_new_tokens=64)


@pytest.mark.parametrize("kind", ["gpt2", "windowed mistral"])
def test_llama_cpp_reads_no_more_than_it_computes_as_trained(tmp_path, monkeypatch, kind):
    """Of a Mistral it computes no window: past the first, a token would see more than it should."""
    read = []

    class Recorder:
        def __init__(self, file):
            assert file.name == GGUF_FILE

        def continue_greedily(self, ids, max_new_tokens, stop_ids):
            read.append(len(ids))
            return []

    monkeypatch.setattr(stillroom.serving, "LlamaCppModel", Recorder)
    monkeypatch.setattr(stillroom.serving, "choose_engine", lambda *_: "llama.cpp")
    windowed = tiny_model("mistral", sliding_window=64, vocab_size=64)
    model = continuing(tiny_gpt2() if kind == "gpt2" else windowed, tmp_path)
    model.predict([LETTERS, "abc"], max_new_tokens=4)
    assert read == [61, 3]
    with pytest.raises(MismatchError, match="at most 64 new tokens, 65 came"):
        model.predict(["a"], max_new_tokens=65)
