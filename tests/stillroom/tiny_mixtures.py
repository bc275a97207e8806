"""Mixtures of experts, small and seeded."""

import torch
import transformers as tf

VALUES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tiny_mixtral(**changes: object) -> tf.MixtralForCausalLM:
    """Return a Mixtral of 4 layers with 3 experts each."""
    values = VALUES | {"num_local_experts": 3} | changes
    return _seeded(tf.MixtralForCausalLM, tf.MixtralConfig(**values))


def tiny_qwen3_moe(**changes: object) -> tf.Qwen3MoeForCausalLM:
    """Return a Qwen3-MoE of 4 layers with 3 experts each, narrower than its `intermediate_size`."""
    values = VALUES | {"num_experts": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return _seeded(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**values | changes))


def tiny_switch(**changes: object) -> tf.SwitchTransformersForConditionalGeneration:
    """Return a Switch Transformer of 4 + 4 layers, the second and fourth with 3 experts each."""
    values = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 3,
        "num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2, "decoder_start_token_id": 0,
    }  # fmt: skip
    config = tf.SwitchTransformersConfig(**values | changes)
    return _seeded(tf.SwitchTransformersForConditionalGeneration, config)


def _seeded(kind: type[tf.PreTrainedModel], config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    # Norms that are all ones would hide a norm that was not copied.
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                elif config.model_type != "switch_transformers" or "relative" in name:
                    parameter.mul_(5)
    return model.eval()
