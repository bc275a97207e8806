import pytest
import torch
import transformers as tf

from stillroom.distillation.width_axes import Axis
from stillroom.distillation.width_probe import find_axes
from stillroom.errors import RecipeError
from tests.stillroom.tiny_decoders import tiny_diffllama
from tests.stillroom.tiny_mixtures import tiny_mixtral, tiny_qwen3_moe, tiny_switch
from tests.stillroom.tiny_widths import VALUES, tiny_of

NARROWED = [
    "llama", "qwen3", "gpt2", "bert", "qwen2", "mistral", "phi3", "gpt_neox", "modernbert", "opt",
]  # fmt: skip
CHANNELS = Axis("channels", (1,), summed=False)
SUMMED_CHANNELS = Axis("channels", (1,), summed=True)


def test_entries_of_parts_side_by_side_and_in_a_row():
    items = torch.tensor([0, 2])
    assert Axis("groups", (2, 1), summed=False).entries(items, 3).tolist() == [0, 1, 4, 5, 6, 8]
    assert Axis("groups", (3,), summed=False).entries(items, 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_every_dimension_of_a_llama():
    axes = find_axes(tiny_of("llama"))
    block = {n.removeprefix("model.layers.1."): a for n, a in axes.items() if ".1." in n}
    neurons, queries, keys = (
        Axis("neurons", (1,), summed=False),
        Axis("groups", (16,), summed=False),
        Axis("groups", (8,), summed=False),
    )
    assert block == {
        "self_attn.q_proj.weight": (queries, SUMMED_CHANNELS),
        "self_attn.k_proj.weight": (keys, SUMMED_CHANNELS),
        "self_attn.v_proj.weight": (keys, SUMMED_CHANNELS),
        "self_attn.o_proj.weight": (CHANNELS, Axis("groups", (16,), summed=True)),
        "mlp.gate_proj.weight": (neurons, SUMMED_CHANNELS),
        "mlp.up_proj.weight": (neurons, SUMMED_CHANNELS),
        "mlp.down_proj.weight": (CHANNELS, Axis("neurons", (1,), summed=True)),
        "input_layernorm.weight": (CHANNELS,),
        "post_attention_layernorm.weight": (CHANNELS,),
    }
    assert axes["model.embed_tokens.weight"] == (None, CHANNELS)


def test_heads_are_told_from_channels_where_there_are_as_many():
    axes = find_axes(tiny_of("bert"))
    layer = "bert.encoder.layer.0.attention."
    heads = Axis("groups", (8,), summed=False)
    for name in ("query", "key", "value"):
        assert axes[f"{layer}self.{name}.weight"] == (heads, SUMMED_CHANNELS)
        assert axes[f"{layer}self.{name}.bias"] == (heads,)
    joined = Axis("groups", (8,), summed=True)
    assert axes[f"{layer}output.dense.weight"] == (CHANNELS, joined)
    assert axes[f"{layer}output.dense.bias"] == (CHANNELS,)
    assert axes["bert.pooler.dense.weight"] == (CHANNELS, SUMMED_CHANNELS)
    assert axes["classifier.weight"] == (None, SUMMED_CHANNELS)


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.bias", (8, 8, 8)),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias", (24,)),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (16, 8, 8)),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (1, 1)),
    ],
)
def test_how_fused_matrices_lie(kind, name, parts):
    axis = find_axes(tiny_of(kind))[name][0]
    assert axis is not None
    assert axis.parts == parts


@pytest.mark.parametrize("kind", NARROWED)
def test_probing_draws_no_random_number_and_changes_nothing(kind):
    model = tiny_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    find_axes(model)
    assert torch.equal(torch.rand(1), expected)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "kind",
    [
        "bloom",  # a position bias that depends on a head's number
        "gemma",  # embeddings scaled by the root of hidden_size
        "mpnet",  # a position bias with heads that all blocks share
        "olmo2",  # a norm over all heads, where heads · head_dim is hidden_size
    ],
)
def test_models_whose_code_uses_a_width_are_refused(kind):
    with pytest.raises(RecipeError, match=r"one way expected .* 0 were found"):
        find_axes(tiny_of(kind))


def test_a_config_without_a_feed_forward_width_is_refused():
    with pytest.raises(RecipeError, match="names the width of its feed-forward layers"):
        find_axes(tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_head=4)))


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_switch])
def test_mixtures_are_refused(make):
    with pytest.raises(RecipeError, match="dense model of one stack"):
        find_axes(make())


def test_sizes_that_a_kind_does_not_allow_are_refused():
    with pytest.raises(RecipeError, match=r"a DiffLlamaForCausalLM allows.*to be even"):
        find_axes(tiny_diffllama())


def test_second_stacks_are_refused():
    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    for model in (
        tf.T5ForConditionalGeneration(config),
        tf.BertLMHeadModel(tf.BertConfig(**VALUES, is_decoder=True, add_cross_attention=True)),
    ):
        with pytest.raises(RecipeError, match="one stack"):
            find_axes(model)


def test_tensors_that_the_config_does_not_describe_are_refused():
    model = tiny_of("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 70, bias=False)
    with pytest.raises(RecipeError, match=r"up_proj.weight is \(70, 32\) for \(64, 32\)"):
        find_axes(model)
