import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillroom.errors import MismatchError
from stillroom.llama_engine import has_llama_cpp
from stillroom.quantization.formats.gguf_export import export_gguf
from stillroom.quantization.formats.gguf_vocabulary import PRE_TOKENIZERS, read_vocabulary
from tests.stillroom.quantization.formats.gguf_models import (
    byte_tokenizer,
    tiny_model,
    write_checkpoint,
)

pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="make install-llama-cpp was not run")
TEXTS = [
    "the thing in there",
    " in 12 of 1212, they'll pay $12.50\n\n\tthen… höher!",
    "<s>the end</s> the<tool>in",
    "x=12;  if (the   all)",
]


def rules(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def with_words(name):
    """Return a byte-level tokenizer that cuts words as llama.cpp's `name` does."""
    (steps,) = (steps for steps, known in PRE_TOKENIZERS.items() if known == name)
    tokenizer = byte_tokenizer()
    kinds = {
        "gpt2 words": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    sequence = [kinds.get(step) or split(step) for step in steps]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(sequence)
    return tokenizer


def sentencepiece_tokenizer(style):
    """Return a tokenizer like Llama 2's: BPE on characters, and bytes for the others."""
    letters = sorted(
        {c for text in TEXTS for c in text.replace(" ", "▁") if c.isascii() or c == "▁"}
    )
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters[:24]]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n")]
    words += ["".join(pair) for pair in merges]
    words += [c for pair in merges for c in pair if c not in words]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    match style:
        case "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        case "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        case "replace":
            tokenizer.normalizer = normalizers.Sequence([spaces])
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_the_steps_before_bpe_are_recognised(name):
    vocabulary = read_vocabulary(rules(with_words(name)), 288)
    assert (vocabulary.kind, vocabulary.pre) == ("gpt2", name)
    assert vocabulary.merges[0] == "t h"


def test_merges_of_a_sentencepiece_tokenizer_become_scores():
    vocabulary = read_vocabulary(rules(sentencepiece_tokenizer("prepend")), 300)
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["th"] > scores["the"] > scores["▁the"] > scores["in"]
    assert vocabulary.space_prefix
    assert vocabulary.types[:4] == [2, 3, 3, 6]
    assert not read_vocabulary(rules(sentencepiece_tokenizer("replace")), 300).space_prefix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": None}, "none"),
        ({"model": {"type": "Unigram"}}, "Unigram"),
    ],
)
def test_steps_that_llama_cpp_does_not_know_are_refused(change, message):
    with pytest.raises(MismatchError, match=message):
        read_vocabulary(rules(byte_tokenizer()) | change, 288)


def test_more_tokens_than_the_model_has_are_refused():
    with pytest.raises(MismatchError, match="below the model's 200"):
        read_vocabulary(rules(byte_tokenizer()), 200)


TOKENIZERS = {name: lambda name=name: with_words(name) for name in PRE_TOKENIZERS.values()} | {
    style: lambda style=style: sentencepiece_tokenizer(style)
    for style in ("metaspace", "prepend", "replace")
}


@pytest.mark.parametrize("name", TOKENIZERS)
@llama_cpp
def test_llama_cpp_makes_the_same_ids(tmp_path, name):
    from llama_cpp import Llama

    tokenizer = TOKENIZERS[name]()
    write_checkpoint(tiny_model("llama", vocab_size=300), tmp_path, tokenizer=tokenizer)
    export_gguf(tmp_path, tmp_path / "model.gguf")
    llama = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    # A metaspace adds no space before a space or behind a special token; llama.cpp does.
    texts = [text for text in TEXTS if text[0] not in " <"] if name == "metaspace" else TEXTS
    for text in texts:
        came = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert came == tokenizer(text)["input_ids"], text
    llama.close()


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("reached", [True, False])
def test_words_that_are_tokens_are_cut_as_llama_cpp_cuts_them(name, reached):
    """Only Llama 3's are taken whole, which shows where the merges do not lead to the token."""
    own = rules(with_words(name))
    own["model"]["vocab"] = {token: i for i, token in enumerate(("a", "b", "c", "bc", "ab", "abc"))}
    own["model"]["merges"] = [["b", "c"], ["a", "b"], ["a", "bc"] if reached else ["ab", "c"]]
    own["added_tokens"] = []
    as_there = name == "llama-bpe"
    own["model"]["ignore_merges"] = as_there
    assert read_vocabulary(own, 6).pre == name
    own["model"]["ignore_merges"] = not as_there
    if reached:
        assert read_vocabulary(own, 6).pre == name
    else:
        with pytest.raises(MismatchError, match="'abc' is cut otherwise"):
            read_vocabulary(own, 6)
