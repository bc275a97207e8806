"""A change of basis that keeps a Llama model's function and takes its weights off their grid."""

import torch
from torch import Tensor, nn

SPREAD = 0.3  # a factor lies between exp(-SPREAD) and exp(SPREAD)


@torch.no_grad()
def rescale_channels(model: nn.Module, generator: torch.Generator) -> None:
    """Rescale pairs of channels by random positive factors, in place.

    In each block: the norms' weights against the columns of the linears behind them, the rows of
    v against the columns of o, the rows of up against the columns of down. All of these maps are
    linear between the two places, so the model computes the same. The final norm and the
    embeddings, which are tied to the head, stay as they are.
    """
    for block in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = block.self_attn, block.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        _move(block.input_layernorm.weight, [each.weight for each in readers], generator)
        readers = [mlp.gate_proj, mlp.up_proj]
        _move(block.post_attention_layernorm.weight, [each.weight for each in readers], generator)
        _rescale_values(attention, generator)
        factors = _factors(mlp.up_proj.out_features, generator)
        mlp.up_proj.weight *= factors[:, None]
        mlp.down_proj.weight /= factors


def _move(norm: Tensor, readers: list[Tensor], generator: torch.Generator) -> None:
    factors = _factors(norm.shape[0], generator)
    norm *= factors
    for weight in readers:
        weight.div_(factors)


def _rescale_values(attention: nn.Module, generator: torch.Generator) -> None:
    """Rescale v against o: each key-value head feeds a run of neighbouring query heads."""
    width = attention.head_dim
    factors = _factors(attention.v_proj.out_features, generator)
    attention.v_proj.weight *= factors[:, None]
    repeats = attention.o_proj.in_features // attention.v_proj.out_features
    by_head = factors.view(-1, width).repeat_interleave(repeats, dim=0)  # (heads, width)
    attention.o_proj.weight /= by_head.flatten()


def _factors(size: int, generator: torch.Generator) -> Tensor:
    return torch.exp((torch.rand(size, generator=generator) * 2 - 1) * SPREAD)
