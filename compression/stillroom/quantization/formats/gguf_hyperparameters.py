"""The numbers of a config.json as GGUF's metadata, which is all that llama.cpp knows of a model."""

from typing import Any

import torch
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.quantization.formats.gguf_architectures import Architecture

UNLIMITED = 2048  # tokens, for models whose positions have no end


def write_hyperparameters(writer: Any, architecture: Architecture, config: Any) -> None:
    """Add a model's widths, heads, norms and positions to a GGUFWriter.

    Raises:
        MismatchError: positions are scaled in a way that GGUF has no words for.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    writer.add_context_length(context_length(architecture, config))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_inner_width(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_vocab_size(config.vocab_size)
    if architecture.norm == "rms":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        names = ("layer_norm_epsilon", "layer_norm_eps")
        writer.add_layer_norm_eps(next(getattr(config, n) for n in names if hasattr(config, n)))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _write_positions(writer, architecture, config)


def context_length(architecture: Architecture, config: Any) -> int:
    """Return up to how many tokens llama.cpp computes what transformers does.

    A sliding window that llama.cpp does not know makes no difference within its first length.
    """
    length = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
    window = getattr(config, "sliding_window", None)
    return length if architecture.windows or not window else min(length, int(window))


def rope_factors(architecture: Architecture, config: Any) -> Tensor | None:
    """Return by what Llama 3 divides the frequency of each rotation, (head / 2,); None: by 1."""
    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3" or architecture.name != "llama":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    plain = rope["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    factors: Tensor = plain / scaled.double()
    return factors.float()


def _write_positions(writer: Any, architecture: Architecture, config: Any) -> None:
    import gguf

    rope = _rope(config)
    if not rope:
        return  # learned positions, or biases
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(
        int(_head_width(config) * (rope.get("partial_rotary_factor") or 1.0))
    )
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default" and rope_factors(architecture, config) is None:
        raise MismatchError(
            f"expected positions scaled as default, linear or (in a Llama) llama3; {kind} came; "
            f"serve the GPTQ checkpoint itself"
        )
    if architecture.windows and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
        local = config.rope_parameters["sliding_attention"]
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))


def _rope(config: Any) -> dict[str, Any]:
    """Return the settings of the rotation, of full attention where there are several."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _inner_width(config: Any) -> int:
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(width or 4 * config.hidden_size)
