"""Models of many kinds whose weights all differ, for tests of their widths."""

import torch
import transformers as tf

from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2, tiny_qwen2

VALUES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = VALUES | {"num_key_value_heads": 2}


def tiny_of(name: str, **changes: object) -> tf.PreTrainedModel:
    """Return a model of one of the kinds KINDS, with large weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[name](**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    # Zeros and ones would hide that they were mixed up.
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                elif name not in ("llama", "bert"):  # theirs are large already
                    parameter.mul_(5)
    return model.eval()


def kind_of(model: type, config: type, values: dict[str, object]):
    return lambda **changes: model(config(**values | changes))


KINDS = {
    "llama": tiny_llama,
    "qwen3": kind_of(tf.Qwen3ForCausalLM, tf.Qwen3Config, GROUPED | {"head_dim": 16}),
    "gpt2": tiny_gpt2,
    "bert": tiny_bert_classifier,
    "qwen2": tiny_qwen2,
    "mistral": kind_of(tf.MistralForCausalLM, tf.MistralConfig, GROUPED),
    "phi3": kind_of(tf.Phi3ForCausalLM, tf.Phi3Config, GROUPED),
    "gpt_neox": kind_of(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, VALUES),
    "modernbert": kind_of(
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig,
        VALUES | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "opt": kind_of(
        tf.OPTForCausalLM, tf.OPTConfig, VALUES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
    ),
    "bloom": kind_of(tf.BloomForCausalLM, tf.BloomConfig, VALUES),
    "gemma": kind_of(tf.GemmaForCausalLM, tf.GemmaConfig, GROUPED | {"head_dim": 8}),
    "mpnet": kind_of(tf.MPNetForSequenceClassification, tf.MPNetConfig, VALUES),
    "olmo2": kind_of(tf.Olmo2ForCausalLM, tf.Olmo2Config, GROUPED),
}
