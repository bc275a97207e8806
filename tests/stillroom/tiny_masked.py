"""Tiny masked language models of each kind whose head is tied to the embeddings."""

from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.stillroom.tiny import seeded, tiny_bert_masked


def tiny_distilbert_masked(layers: int = 4) -> DistilBertForMaskedLM:
    """Return a DistilBERT of a few thousand parameters that names hidden words."""
    config = DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=64, n_layers=layers, n_heads=4, max_position_embeddings=64
    )
    return seeded(DistilBertForMaskedLM, config)


def tiny_roberta_masked(layers: int = 4) -> RobertaForMaskedLM:
    """Return a RoBERTa of a few thousand parameters that names hidden words."""
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(RobertaForMaskedLM, config)


MASKED = {
    "masked bert": lambda: tiny_bert_masked(layers=4),
    "masked distilbert": tiny_distilbert_masked,
    "masked roberta": tiny_roberta_masked,
}
