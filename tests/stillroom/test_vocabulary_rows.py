from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from stillroom.errors import RecipeError
from stillroom.models import load_model, load_tokenizer, save_model, tokenizer_hash
from stillroom.vocabulary import trim_vocabulary, used_words, words_to_keep
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2
from tests.stillroom.trained_tokenizers import (
    CORPUS,
    ids,
    logits,
    trained,
)


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
    tasks |= {"bert masked": "masked_lm"}
    loaded: Any = load_model(tmp_path, task=tasks.get(name, "causal_lm"))
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


def test_a_configuration_that_cannot_be_renumbered_is_refused() -> None:
    tokenizer = trained("bpe")
    keep = words_to_keep(tokenizer, {})
    model = tiny_llama(vocab=len(tokenizer))
    model.generation_config.sequence_bias = [[[5], 1.0]]
    with pytest.raises(RecipeError, match="expected no sequence_bias in the generation config"):
        trim_vocabulary(model, tokenizer, keep)
    model.config.vocab_size -= 1
    with pytest.raises(RecipeError, match="expected vocab_size to be the"):
        trim_vocabulary(model, tokenizer, keep)


def test_packed_embeddings_are_refused() -> None:
    tokenizer = trained("bpe")
    model = tiny_llama(vocab=len(tokenizer))
    packed = torch.zeros(len(tokenizer), 32, dtype=torch.int8)
    model.model.embed_tokens.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(RecipeError, match="cut the model before it is packed"):
        trim_vocabulary(model, tokenizer, words_to_keep(tokenizer, {}))
