"""Bases of every kind that prompts are put on, small and seeded, with rows for them."""

import torch
import transformers as tf
from torch import nn

from stillroom.adapters.options import PTuningOptions
from stillroom.adapters.prompted_base import embedding_of_text
from stillroom.adapters.prompts import PromptAdapter
from tests.stillroom.adapters.quantized import quantize_blocks
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2
from tests.stillroom.tiny_masked import tiny_distilbert_masked, tiny_roberta_masked
from tests.stillroom.tiny_widths import tiny_of

WORDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_llama_classifier() -> tf.LlamaForSequenceClassification:
    """Return a decoder that classifies by a row's last token."""
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, num_labels=3, **WORDS,
    )  # fmt: skip
    return _seeded(tf.LlamaForSequenceClassification, config)


def tiny_t5() -> tf.T5ForConditionalGeneration:
    """Return an encoder-decoder whose two halves share their embeddings."""
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    return _seeded(tf.T5ForConditionalGeneration, config)


def tiny_bart() -> tf.BartForConditionalGeneration:
    """Return an encoder-decoder with learned positions."""
    config = tf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None, **WORDS,
    )  # fmt: skip
    return _seeded(tf.BartForConditionalGeneration, config)


BASES = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "quantized": lambda: quantize_blocks(tiny_llama()),
    "llama classifier": tiny_llama_classifier,
    "bert": tiny_bert_classifier,
    "masked": tiny_bert_masked,
    "roberta": tiny_roberta_masked,
    "distilbert": tiny_distilbert_masked,
    "mpnet": lambda: tiny_of("mpnet", num_labels=3),
    "t5": tiny_t5,
    "bart": tiny_bart,
}
ROWS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34]]
PROMPT = (40, 41, 42, 43, 44)
EVERYWHERE = ((0, 2), (2, 1), (-1, 2))
INSIDE = ((0, 2), (2, 3))
CAUSAL = ("llama", "gpt2", "quantized")
BOTH_HALVES = ("t5", "bart")


def frozen(kind: str) -> nn.Module:
    """Return a base as an adapter gets it."""
    return BASES[kind]().requires_grad_(False)


def call(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **inputs: object) -> object:
    """Return what a base answers to rows, the same words for a decoder's half."""
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 9, 8, 7]]).expand(len(ids), -1)
    return model(input_ids=ids, attention_mask=mask, **inputs)


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows that are padded with 0 to the longest."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        ids = [pad + row for pad, row in zip(fill, rows, strict=True)]
        mask = [pad + one for pad, one in zip(fill, ones, strict=True)]
    else:
        ids = [row + pad for pad, row in zip(fill, rows, strict=True)]
        mask = [one + pad for pad, one in zip(fill, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def with_words(row: list[int], template) -> list[int]:
    """Return a row with the prompt's words as text, the slow and obvious way."""
    words = list(PROMPT)
    inside = {}
    for place, count in template:
        at = len(row) if place == -1 else min(place, len(row))
        inside.setdefault(at, []).extend(words[:count])
        del words[:count]
    written = []
    for column, token in enumerate([*row, None]):
        written += inside.get(column, []) + ([] if token is None else [token])
    return written


def p_tuned(base, template) -> PromptAdapter:
    """Return worn embeddings of the prompt's words."""
    part = PromptAdapter(base, PTuningOptions(template, encoder_width=8), 0)
    part.take({"embeddings": embedding_of_text(base)(torch.tensor(PROMPT)).detach()})
    part.wear(True)
    return part


def _seeded(kind: type[tf.PreTrainedModel], config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                elif config.model_type != "t5":
                    parameter.mul_(5)
    return model.eval()
