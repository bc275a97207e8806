"""The architectures that llama.cpp runs and a GGUF of ours can hold, and what each wants changed.

llama.cpp's Llama rotates neighbouring rows of q and k where transformers rotates the two halves of
a head; it wants the rows of a fused projection as all q, all k, all v. Both reorder whole rows, so
groups, scales and zero points stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stillroom.errors import MismatchError

GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a kind of model, and how its checkpoint differs from transformers'."""

    name: str
    """GGUF's name of it."""
    norm: Literal["rms", "layer"] = "rms"
    activations: tuple[str, ...] = ("silu",)
    """Names in config.json of what llama.cpp computes."""
    swapped_halves: bool = False
    """The rows of q and k are reordered for rotations of neighbours."""
    fused_by_head: bool = False
    """query_key_value lists q, k and v of each head; llama.cpp wants all q, all k, all v."""
    transposed: bool = False
    """Matrices that are not quantized are stored (in, out)."""
    norm_offset: float = 0.0
    """Added to the weights of norms, which llama.cpp multiplies with as they are."""
    own_output: bool = False
    """The head is stored even where it is tied to the embeddings."""
    windows: bool = False
    """Layers with a sliding window are computed as such."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that must have this value if they are there."""


ARCHITECTURES = {
    "llama": Architecture("llama", swapped_halves=True),
    "mistral": Architecture("llama", swapped_halves=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture(
        "gemma3",
        activations=("gelu_pytorch_tanh",),
        norm_offset=1.0,
        windows=True,
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "gpt2": Architecture(
        "gpt2",
        norm="layer",
        activations=GELUS,
        transposed=True,
        fixed={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True},
    ),
    "phi": Architecture(
        "phi2", norm="layer", activations=GELUS, own_output=True, fixed={"qk_layernorm": False}
    ),
    "phi3": Architecture("phi3"),
    "gpt_neox": Architecture(
        "gptneox", norm="layer", activations=GELUS, fused_by_head=True, own_output=True
    ),
    "bloom": Architecture(
        "bloom",
        norm="layer",
        activations=GELUS,
        fused_by_head=True,
        fixed={"apply_residual_connection_post_layernorm": False},
    ),
}


def find_architecture(config: Any) -> Architecture:
    """Return how llama.cpp runs the model of a transformers config.

    Raises:
        MismatchError: it does not, or not with these settings.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise MismatchError(
            f"expected an architecture that GGUF is written for ({', '.join(ARCHITECTURES)}); "
            f"{config.model_type} came; serve the GPTQ checkpoint itself"
        )
    wanted = dict(known.fixed)
    if known.name == "gemma3":
        wanted["query_pre_attn_scalar"] = config.head_dim
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            raise MismatchError(
                f"expected {name}: {value} in config.json, which is what llama.cpp computes; "
                f"{getattr(config, name)} came; serve the GPTQ checkpoint itself"
            )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    activation = activation or getattr(config, "activation_function", known.activations[0])
    if activation not in known.activations:
        raise MismatchError(
            f"expected the activation {' or '.join(known.activations)}, which llama.cpp computes "
            f"for {known.name}; {activation} came; serve the GPTQ checkpoint itself"
        )
    return known


def tensor_names(architecture: Architecture, blocks: int) -> Any:
    """Return a function from a tensor's name in the checkpoint to its name in GGUF.

    The function raises MismatchError for tensors that GGUF has no place for.
    """
    import gguf

    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(arch, blocks)

    def name_of(name: str) -> str:
        # Bloom's names are listed without the model's own prefix.
        for candidate in (name, name.removeprefix("transformer.")):
            found = known.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return str(found)
        raise MismatchError(
            f"expected the tensors of a {architecture.name}; {name} has no place in its GGUF; "
            f"serve the GPTQ checkpoint itself"
        )

    return name_of


def row_order(architecture: Architecture, config: Any, name: str, rows: int) -> Tensor | None:
    """Return which row of a checkpoint's layer `name` each row in GGUF is, (rows,); None: the same.

    `name` is the layer's, without .weight or .bias.
    """
    last = name.rpartition(".")[2]
    order = torch.arange(rows)
    if architecture.swapped_halves and last in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
        return order.view(heads, 2, -1).transpose(1, 2).reshape(-1)
    if architecture.fused_by_head and last == "query_key_value":
        return order.view(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)
    return None
