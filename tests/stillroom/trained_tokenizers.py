"""Tokenizers trained in a moment, and what a tokenizer and a model that were cut must keep."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stillroom.vocabulary import trim_vocabulary
from tests.stillroom.tiny import tiny_llama

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
