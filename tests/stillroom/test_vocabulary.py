import os
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stillroom.builtin import builtin_file, import_builtin
from stillroom.errors import RecipeError
from stillroom.models import load_model, load_tokenizer, save_model, tokenizer_hash
from stillroom.vocabulary import trim_vocabulary, used_words, words_to_keep
from tests.stillroom.tiny import (
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_llama,
    tiny_tokenizer,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog jumps, too",
    "a vocabulary holds words; a tokenizer cuts a text into words",
    "naïve café 東京 and über, résumé of the résumé",
    "def encode(self, text): return [self.words[word] for word in text.split()]",
] * 4
OTHER = [
    "",
    " ",
    "the dog holds a lazy fox; the fox jumps over vocabulary and tokenizers",
    "Ünïcödé ﬁ ｆｕｌｌ ½ \t\r\n\x00 \u200b",
    "Привет, мир! こんにちは世界 안녕하세요 שלום العالم हिन्दी ไทย",
    "🤖 👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9ff𝔘𝔫𝔦",
    "<s>the dog</s> <pad><unk> <tool> x",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
KINDS = ["bpe", "marked-bpe", "fallback-bpe", "wordpiece", "unigram"]


@cache
def trained(kind: str, size: int = 400) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on CORPUS, with special tokens around a text."""
    trainer: Any
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "marked-bpe":
        backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, end_of_word_suffix="</w>"
        )
    elif kind == "fallback-bpe":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256,
            special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    trainer.show_progress = False
    backend.train_from_iterator(CORPUS, trainer)
    # An added token whose id follows the trained words.
    backend.add_tokens(["<tool>"])
    end = backend.token_to_id("</s>")
    if kind == "wordpiece":
        backend.post_processor = processors.BertProcessing(("</s>", end), ("<s>", 1))
    else:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 1), ("</s>", end)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=77,
        chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    )


def cut(tokenizer: Any, keep: list[int]) -> Any:
    """Return the tokenizer of a model cut down to `keep`."""
    return trim_vocabulary(tiny_llama(vocab=len(tokenizer)), tokenizer, keep)[1]


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def assert_same_cut(old: Any, new: Any, keep: list[int], texts: Iterable[str]) -> int:
    """Check what a cut tokenizer promises; return how many texts were made of kept words."""
    kept, whole = set(keep), 0
    for text in texts:
        before, after = ids(old, text), ids(new, text)
        if kept.issuperset(before):
            whole += 1
            assert [keep[index] for index in after] == before
        else:
            assert before.count(old.unk_token_id) >= after.count(new.unk_token_id)
        assert old.decode(before) == new.decode(after)
    return whole


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


# --- models ---


def tiny_gpt2(vocab: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def untied_llama(vocab: int) -> LlamaForCausalLM:
    config = tiny_llama(vocab=vocab).config
    config.tie_word_embeddings = False
    config.eos_token_id = [2, vocab - 1]
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def biased_masked(vocab: int) -> Any:
    model = tiny_bert_masked(vocab=vocab)
    with torch.no_grad():
        model.cls.predictions.bias.uniform_(-1, 1)
    return model


MODELS = {
    "tied llama": lambda vocab: tiny_llama(vocab=vocab),
    "untied llama": untied_llama,
    "gpt2": tiny_gpt2,
    "bert masked": biased_masked,
    "bert classifier": lambda vocab: tiny_bert_classifier(vocab=vocab),
}


def logits(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(rows)).logits


@pytest.mark.parametrize("surplus", [0, 24])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_old_ones_at_the_kept_words(name: str, surplus: int, tmp_path: Path) -> None:
    old_tokenizer = trained("bpe")
    old = MODELS[name](len(old_tokenizer) + surplus)
    if name == "untied llama":
        old.config.eos_token_id = [2, old_tokenizer.convert_tokens_to_ids("<tool>")]
    keep = words_to_keep(old_tokenizer, used_words(old_tokenizer, CORPUS[:2]))
    before = {key: value.clone() for key, value in old.state_dict().items()}
    new, tokenizer = trim_vocabulary(old, old_tokenizer, keep)

    assert type(new) is type(old)
    assert new.config.vocab_size == len(keep) == new.get_input_embeddings().num_embeddings
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())
    assert old.config.vocab_size == len(old_tokenizer) + surplus
    places = {tensor.data_ptr() for tensor in old.state_dict().values()}
    assert not places & {tensor.data_ptr() for tensor in new.state_dict().values()}

    after = ids(tokenizer, CORPUS[0])
    expected = logits(old, [ids(old_tokenizer, CORPUS[0])])
    if name != "bert classifier":
        expected = expected[..., keep]
        head, old_head = new.get_output_embeddings(), old.get_output_embeddings()
        tied = old_head.weight is old.get_input_embeddings().weight
        assert (head.weight is new.get_input_embeddings().weight) is tied
        assert head.out_features == len(keep)
    assert torch.equal(logits(new, [after]), expected)

    save_model(new, tokenizer, tmp_path)
    task = "sequence_classification" if name == "bert classifier" else "causal_lm"
    if name == "bert masked":
        loaded: Any = type(new).from_pretrained(tmp_path).eval()
    else:
        loaded = load_model(tmp_path, task=task)
    assert torch.equal(logits(loaded, [after]), expected)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    assert ids(load_tokenizer(tmp_path), CORPUS[0]) == after


def test_every_id_of_the_configuration_is_renumbered() -> None:
    tokenizer = trained("bpe")
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    old = untied_llama(len(tokenizer))
    old.config.pad_token_id = -1
    old.generation_config.eos_token_id = [2, tool]
    old.generation_config.suppress_tokens = [tool]
    keep = words_to_keep(tokenizer, {})
    new, _ = trim_vocabulary(old, tokenizer, keep)
    assert new.config.eos_token_id == new.generation_config.eos_token_id == [2, len(keep) - 1]
    assert new.generation_config.suppress_tokens == [len(keep) - 1]
    assert new.config.bos_token_id == 1
    assert new.config.pad_token_id == -1
    assert old.generation_config.suppress_tokens == [tool]
    old.config.eos_token_id = next(i for i in range(len(tokenizer)) if i not in keep)
    with pytest.raises(RecipeError, match="eos_token_id among the kept words"):
        trim_vocabulary(old, tokenizer, keep)
