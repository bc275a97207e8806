"""Further decoders, small and seeded, that are built unlike a Llama."""

from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.stillroom.tiny import seeded

# Of GPT-2 and what resembles it, and of what resembles a Llama.
WORDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = WORDS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_gpt2(vocab: int = 64, scaled_by_layer: bool = False) -> GPT2LMHeadModel:
    """Return a GPT-2, whose linears are Conv1D, with 4 layers, which may scale by their number."""
    values = WORDS | {"vocab_size": vocab, "n_embd": 32, "n_layer": 4, "n_head": 4}
    config = GPT2Config(**values, n_positions=64, scale_attn_by_inverse_layer_idx=scaled_by_layer)
    return seeded(GPT2LMHeadModel, config, times=1)


def tiny_qwen2() -> Qwen2ForCausalLM:
    """Return a model of 4 layers whose config lists a kind of attention for each."""
    config = Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    return seeded(Qwen2ForCausalLM, config, times=1)


def tiny_gpt_neo() -> GPTNeoForCausalLM:
    """Return a model of 4 layers, each second of which sees 4 tokens, that know a `layer_id`."""
    kinds = [[["global", "local"], 2]]
    values = WORDS | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 4}
    config = GPTNeoConfig(**values, max_position_embeddings=64, attention_types=kinds)
    return seeded(GPTNeoForCausalLM, config, times=1)


def tiny_diffllama() -> DiffLlamaForCausalLM:
    """Return a model of 4 layers, each of which computes a weight from its number."""
    return seeded(DiffLlamaForCausalLM, DiffLlamaConfig(**LLAMA), times=1)
