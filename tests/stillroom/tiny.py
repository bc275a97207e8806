"""Models and tokenizers small enough to build in a moment, with weights from a seed."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def tiny_llama(
    seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = 64
) -> LlamaForCausalLM:
    """Return a Llama of a few thousand parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return seeded(LlamaForCausalLM, config, seed)


def tiny_bert_classifier(
    seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = 64, labels: int = 3
) -> BertForSequenceClassification:
    """Return a BERT classifier of a few thousand parameters."""
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=labels,
    )
    return seeded(BertForSequenceClassification, config, seed)


def tiny_bert_masked(
    seed: int = 0, layers: int = 2, hidden: int = 32, vocab: int = 64
) -> BertForMaskedLM:
    """Return a masked language model of a few thousand parameters."""
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return seeded(BertForMaskedLM, config, seed)


def tiny_masked_tokenizer(mask: str = "[MASK]") -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters that closes rows with [CLS] and [SEP] and knows a mask.

    5 special tokens, then the letters: a is 6, 60 words in all. Unknown is 3.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
    special = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", mask)
    words = {word: i for i, word in enumerate((*special, *characters))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token=mask,
    )


def seeded(
    kind: type[PreTrainedModel], config: object, seed: int = 0, *, times: float = 5
) -> PreTrainedModel:
    """Return a model whose matrices are drawn from a seed, so many times as large as usual.

    Usual is 0.02: the outputs of so small a model would not differ by position.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(times)
    return model.eval()


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Return a character tokenizer: 4 special tokens, then the letters; unknown is 3."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;()"[: vocab - 4]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words |= {character: 4 + i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
