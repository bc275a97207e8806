"""Tiny models of every kind that adapters are to fit, dense and packed, and what they answer."""

import torch
import transformers as tf
from torch import nn

from stillroom.adapters.places import adaptable_stacks
from stillroom.blocks import find_linears
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack, values_per_unit
from stillroom.quantization.rounding import round_to_nearest
from tests.stillroom.quantization.test_architectures import BESIDE_BLOCKS, MODELS, make
from tests.stillroom.tiny_mixtures import VALUES

KINDS = tuple(kind for kind in MODELS if kind not in BESIDE_BLOCKS)
MIXTURES = ("mixtral", "qwen3_moe")


def build(kind: str, bits: int | None = None) -> nn.Module:
    """Return the model `kind`, frozen; its blocks' linears are packed where bits are given."""
    model = make(kind)
    if bits is not None:
        for blocks in adaptable_stacks(model).values():
            for block in blocks:
                _pack_linears(block, bits)
    return model.requires_grad_(False)


def tiny_deepseek() -> tf.DeepseekV2ForCausalLM:
    """Return a DeepSeek-V2: a dense block, then a mixture; keys are wider than values."""
    sizes = {
        "num_key_value_heads": 4, "n_routed_experts": 3, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_hidden_layers": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**VALUES | sizes))
    return model.eval().requires_grad_(False)


def words(rows: int = 4, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Return (rows, length) words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 64, (rows, length), generator=generator)


def answer(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits, of a decoder with the same words where the model has one."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=mask, **more).logits


def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return a loss that training can lower: of naming one word or class everywhere."""
    logits = answer(model, ids)
    return nn.functional.cross_entropy(logits.flatten(0, -2), ids.new_ones(logits[..., 0].numel()))


def train(model: nn.Module, part: nn.Module, steps: int = 5, rate: float = 1e-2) -> list[float]:
    """Train a part that is worn, and return the losses."""
    optimizer = torch.optim.AdamW(part.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        value = loss(model, words())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.clone() for name, tensor in tensors}


def _pack_linears(block: nn.Module, bits: int) -> None:
    for name, linear in find_linears(block).items():
        # Words of 3 bits take 32 rows.
        if min(linear.weight.shape) % values_per_unit(bits):
            continue
        stored = linear.weight.detach()
        weight = stored if isinstance(linear, nn.Linear) else stored.T.contiguous()
        packed = pack(round_to_nearest(weight, QuantizationOptions(bits, 16)).weight)
        bias = None if linear.bias is None else linear.bias.detach()
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, QuantizedLinear(packed, bias, bits))
