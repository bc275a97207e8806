import pydoc_data.topics
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
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from stillroom import vocabulary
from stillroom.builtin import import_builtin
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
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
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
    config.eos_token_id = [2, 3]
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def biased_masked(vocab: int) -> Any:
    model = tiny_bert_masked(vocab=vocab)
    with torch.no_grad():
        model.cls.predictions.bias.uniform_(-1, 1)
    return model


def tiny_t5(vocab: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def tiny_bart(vocab: int) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=vocab,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
    )
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.uniform_(-1, 1)
    return model


MODELS = {
    "tied llama": lambda vocab: tiny_llama(vocab=vocab),
    "untied llama": untied_llama,
    "gpt2": tiny_gpt2,
    "bert masked": biased_masked,
    "t5": tiny_t5,
    "bart": tiny_bart,
    "bert classifier": lambda vocab: tiny_bert_classifier(vocab=vocab),
}


def logits(
    model: PreTrainedModel, rows: list[list[int]], keep: list[int] | None = None
) -> torch.Tensor:
    """Return the logits, those of the words `keep` through a head of their rows alone.

    A matrix product may sum in another order when the matrix has other sizes, so that the last bit
    of a logit hangs on how many other words there are.
    """
    head = model.get_output_embeddings() if keep else None
    handles = []
    if head is not None:
        bias = None if head.bias is None else head.bias[keep]

        def narrow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output[..., keep] = torch.nn.functional.linear(inputs[0], head.weight[keep], bias)
            return output

        handles.append(head.register_forward_hook(narrow))
    ids = {"input_ids": torch.tensor(rows)}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.inference_mode():
        result = model(**ids).logits
    for handle in handles:
        handle.remove()
    return result if head is None else result[..., keep]


@pytest.mark.parametrize("surplus", [0, 24])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_old_ones_at_the_kept_words(name: str, surplus: int, tmp_path: Path) -> None:
    old_tokenizer = trained("bpe")
    old = MODELS[name](len(old_tokenizer) + surplus)
    keep = words_to_keep(old_tokenizer, used_words(old_tokenizer, CORPUS[:2]))
    before = {key: value.clone() for key, value in old.state_dict().items()}
    new, tokenizer = trim_vocabulary(old, old_tokenizer, keep)

    assert type(new) is type(old)
    assert new.config.vocab_size == len(keep) == new.get_input_embeddings().num_embeddings
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())
    assert old.config.vocab_size == len(old_tokenizer) + surplus
    places = {tensor.data_ptr() for tensor in old.state_dict().values()}
    assert not places & {tensor.data_ptr() for tensor in new.state_dict().values()}

    before_ids, after = ids(old_tokenizer, CORPUS[0]), ids(tokenizer, CORPUS[0])
    assert torch.equal(logits(new, [after]), logits(old, [before_ids], keep))
    if name != "bert classifier":
        torch.testing.assert_close(logits(new, [after]), logits(old, [before_ids])[..., keep])
        head, old_head = new.get_output_embeddings(), old.get_output_embeddings()
        tied = old_head.weight is old.get_input_embeddings().weight
        assert (head.weight is new.get_input_embeddings().weight) is tied
        assert head.out_features == len(keep)

    save_model(new, tokenizer, tmp_path)
    tasks = {"bert classifier": "sequence_classification", "t5": "seq2seq_lm", "bart": "seq2seq_lm"}
    tasks = {"bert classifier": "sequence_classification", "t5": "seq2seq_lm", "bart": "seq2seq_lm"}
    if name == "bert masked":
        loaded: Any = type(new).from_pretrained(tmp_path)
    else:
        loaded = load_model(tmp_path, task=tasks.get(name, "causal_lm"))
    # Not the logits' bits: a matrix read from a file may lie at another alignment.
    again = loaded.state_dict()
    assert again.keys() == new.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in new.state_dict().items())
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    assert ids(load_tokenizer(tmp_path), CORPUS[0]) == after


def test_every_id_of_the_configuration_is_renumbered() -> None:
    tokenizer = trained("bpe")
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    old = untied_llama(len(tokenizer))
    old.config.eos_token_id = [2, tool]
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


# --- what is refused ---


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


def test_a_model_with_fewer_rows_than_the_tokenizer_has_words_is_refused() -> None:
    tokenizer = trained("bpe")
    keep = words_to_keep(tokenizer, {})
    with pytest.raises(RecipeError, match="use the tokenizer the model was trained with"):
        trim_vocabulary(tiny_llama(vocab=len(tokenizer) - 1), tokenizer, keep)


def test_a_model_with_another_table_of_words_is_refused() -> None:
    tokenizer = trained("bpe")
    keep = words_to_keep(tokenizer, {})
    model: Any = tiny_llama(vocab=len(tokenizer))
    model.per_word = torch.nn.Embedding(len(tokenizer), 2)
    with pytest.raises(RecipeError, match=r"per_word\.weight of \(\d+, 2\)"):
        trim_vocabulary(model, tokenizer, keep)
    model.per_word = torch.nn.Linear(len(tokenizer), 2)
    with pytest.raises(RecipeError, match=r"per_word\.weight of \(2, \d+\)"):
        trim_vocabulary(model, tokenizer, keep)
    with pytest.raises(RecipeError, match="expected a transformers model, Linear came"):
        trim_vocabulary(torch.nn.Linear(2, 2), tokenizer, keep)


def test_positions_that_count_from_the_padding_keep_it_where_it_is() -> None:
    tokenizer = trained("bpe")
    keep = words_to_keep(tokenizer, {})
    for pad, name in ((0, "<pad>"), (len(tokenizer) - 1, "<tool>")):
        assert tokenizer.convert_tokens_to_ids(name) == pad
        config = RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=len(tokenizer) + 64,
            pad_token_id=pad,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = RobertaForMaskedLM(config).eval()
        if pad:
            with pytest.raises(RecipeError, match="position_embeddings counts from"):
                trim_vocabulary(model, tokenizer, keep)
        else:
            new, _ = trim_vocabulary(model, tokenizer, keep)
            assert torch.equal(logits(new, [[1, 5, 2]]), logits(model, [[1, keep[5], 2]], keep))


# --- models that people use ---


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
