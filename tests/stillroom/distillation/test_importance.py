import pytest
import torch

from stillroom.distillation.importance import measure_importance
from stillroom.distillation.width_probe import find_axes
from stillroom.distillation.width_sizes import read_sizes
from stillroom.errors import DataError
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny_widths import tiny_of

# Block list, norms, the layer that sums over neurons, the one that joins the heads.
PLACES = {
    "llama": ("model.layers", ("input_layernorm", "post_attention_layernorm"), "mlp.down_proj",
              "self_attn.o_proj"),
    "qwen3": ("model.layers", ("input_layernorm", "post_attention_layernorm"), "mlp.down_proj",
              "self_attn.o_proj"),
    "gpt2": ("transformer.h", ("ln_1", "ln_2"), "mlp.c_proj", "attn.c_proj"),
    "bert": ("bert.encoder.layer", ("attention.output.LayerNorm", "output.LayerNorm"),
             "output.dense", "attention.output.dense"),
}  # fmt: skip


@torch.no_grad()
def slow_importance(model, kind, rows):
    """Token by token, and row by row without its padding."""
    blocks, norms, down, joining = PLACES[kind]
    sizes = read_sizes(model.config)
    channels = torch.zeros(sizes.hidden, dtype=torch.float64)
    found = {}

    def keep(name, value):
        found[name] = value[0]  # (length, width)

    hooks = []
    layers = model.get_submodule(blocks)
    for i, layer in enumerate(layers):
        for name in norms:
            norm = layer.get_submodule(name)
            hooks.append(norm.register_forward_hook(lambda m, x, y, n=(i, name): keep(n, y)))
        for name in (down, joining):
            linear = layer.get_submodule(name)
            hooks.append(linear.register_forward_pre_hook(lambda m, x, n=(i, name): keep(n, x[0])))
    neurons = [torch.zeros(sizes.intermediate, dtype=torch.float64) for _ in layers]
    groups = [torch.zeros(sizes.groups, dtype=torch.float64) for _ in layers]
    tokens = 0
    for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True):
        length = int(mask.sum())
        model(input_ids=ids[None, :length])
        tokens += length
        for i in range(len(layers)):
            for t in range(length):
                for name in norms:
                    channels += found[i, name][t].abs().double() / (len(norms) * len(layers))
                neurons[i] += found[i, down][t].abs().double()
                for head in range(sizes.heads):
                    part = found[i, joining][t][head * sizes.head_dim : (head + 1) * sizes.head_dim]
                    groups[i][head // sizes.ratio] += part.double().square().sum().sqrt()
    for hook in hooks:
        hook.remove()
    return channels / tokens, [n / tokens for n in neurons], [g / tokens for g in groups]


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("batch_rows", [1, 4])
def test_importance_is_that_of_a_slow_computation(kind, batch_rows):
    model = tiny_of(kind)
    rows = token_rows(3, padding=5)
    came = measure_importance(
        model, find_axes(model), read_sizes(model.config), rows, batch_rows=batch_rows
    )
    channels, neurons, groups = slow_importance(model, kind, rows)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(came.channels, channels, **close)
    for one, other in zip(came.neurons + came.groups, neurons + groups, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_the_models_mode_and_hooks_are_as_before():
    model = tiny_of("bert").train()
    axes, sizes = find_axes(model), read_sizes(model.config)
    first = measure_importance(model, axes, sizes, token_rows())
    again = measure_importance(model, axes, sizes, token_rows())
    assert torch.equal(first.channels, again.channels)  # no dropout
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_tokens_it_is_refused():
    model = tiny_of("llama")
    with pytest.raises(DataError, match=r"there are none; set data\.calibration_rows"):
        measure_importance(
            model, find_axes(model), read_sizes(model.config), token_rows().take(slice(0))
        )
