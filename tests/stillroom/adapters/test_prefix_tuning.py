import copy
import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stillroom.adapters.options import PrefixOptions
from stillroom.adapters.prefix_attention import Prefix, put_on, take_off
from stillroom.adapters.prefix_tuning import PrefixAdapter, PrefixEncoder
from stillroom.errors import RecipeError, SourceError
from stillroom.training.modes import recomputing
from tests.stillroom.adapters.zoo import (
    KINDS,
    MIXTURES,
    answer,
    build,
    state,
    tiny_deepseek,
    train,
    words,
)
from tests.stillroom.tiny import tiny_llama

TOKENS = 3
FITTING = [kind for kind in KINDS if kind != "bloom"]


def put(model, rows=True, width=None, seed=0):
    part = PrefixAdapter(model, PrefixOptions(TOKENS, width), seed)
    part.wear(rows)
    return part


def disturb(part):
    generator = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", FITTING)
def test_every_attention_has_one_and_taken_off_nothing_is_left(kind):
    model = build(kind)
    configs = [getattr(module, "config", None) for module in model.modules()]
    with torch.no_grad():
        expected = answer(model, words())
        part = put(model)
        assert (answer(model, words()) - expected).norm() > 1e-2 * expected.norm()
        part.wear(False)
        assert torch.equal(answer(model, words()), expected)
    after = [getattr(module, "config", None) for module in model.modules()]
    assert all(a is b for a, b in zip(configs, after, strict=True))
    # Blocks, and of each whose attentions: a decoder's block of T5 has two.
    layers = 2 * 3 if kind == "t5" else 2
    assert len(part.tensors()) == 2 * layers
    heads = 2 if kind in ("llama", "mistral", "qwen3", "gemma3", *MIXTURES) else 4
    assert {tuple(t.shape) for t in part.tensors().values()} == {(heads, TOKENS, 8)}


def test_other_models_and_the_registry_stay():
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    other, model = build("llama"), build("llama")
    expected = answer(other, words())
    put(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(answer(other, words()), expected)
    after = dict(ALL_ATTENTION_FUNCTIONS.items())
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"stillroom_prefix"}


@pytest.mark.parametrize("kind", FITTING)
def test_training_lowers_the_loss_and_leaves_the_base(kind):
    model = build(kind)
    before = state(model)
    part = put(model)
    losses = train(model, part)
    assert losses[-1] < losses[0]
    # Whatever all keys have in common changes no softmax, so a key's gradient may be small.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_training_on_a_packed_base(kind, bits):
    model = build(kind, bits)
    before = state(model)
    losses = train(model, put(model, width=4))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("kind", FITTING)
def test_rows_are_routed(kind):
    model = build(kind)
    mask = torch.ones_like(words())
    mask[2, 5:] = 0
    with torch.no_grad():
        for seen in (None, mask):
            plain = answer(model, words(), seen)
            part = put(model)
            worn = answer(model, words(), seen)
            part.wear(torch.tensor([2, 0]))
            mixed = answer(model, words(), seen)
            part.detach()
            torch.testing.assert_close(mixed[[0, 2]], worn[[0, 2]], rtol=1e-5, atol=1e-5)
            if kind in MIXTURES:  # an expert's product has the tokens of all rows
                torch.testing.assert_close(mixed[[1, 3]], plain[[1, 3]], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(mixed[[1, 3]], plain[[1, 3]])


def test_two_prefixes_in_one_batch():
    model = build("llama")
    parts = [put(model, rows=False, seed=seed) for seed in (0, 1)]
    alone = []
    with torch.no_grad():
        plain = answer(model, words())
        for part in parts:
            part.wear(True)
            alone.append(answer(model, words()))
            part.wear(False)
        parts[0].wear(torch.tensor([0, 1]))
        parts[1].wear(torch.tensor([3]))
        mixed = answer(model, words())
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    expected = torch.stack([alone[0][0], alone[0][1], plain[2], alone[1][3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def numbers(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def explicit(query, prefix, text, seen, bias):
    """Attend query by query, head by head, to the prefix and to the text that is seen."""
    (keys, values), (key, value) = prefix, text
    batch, heads, queries, width = query.shape
    output = torch.zeros((batch, queries, heads, width))
    group = heads // key.shape[1]
    for row in range(batch):
        for head in range(heads):
            shared = head // group
            for place in range(queries):
                allowed = seen[row, place].nonzero().flatten()
                all_keys = torch.cat([keys[shared], key[row, shared, allowed]])
                all_values = torch.cat([values[shared], value[row, shared, allowed]])
                scores = all_keys @ query[row, head, place] / math.sqrt(width)
                scores[len(keys[shared]) :] += bias[head, place, allowed]
                output[row, place, head] = scores.softmax(0) @ all_values
    return output


@pytest.mark.parametrize("length", [(5, 5), (1, 5), (2, 5)])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "longer"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_is_a_softmax_over_both(kind, mask, length):
    queries, keys = length
    layer = build("llama").model.layers[0].self_attn
    layer.config._attn_implementation = kind
    query, text = (
        numbers((2, 4, queries, 8), 0),
        (numbers((2, 2, keys, 8), 1), numbers((2, 2, keys, 8), 2)),
    )
    prefix = (numbers((2, TOKENS, 8), 3), numbers((2, TOKENS, 8), 4))
    seen = numbers((2, queries, keys), 5) > 0
    given = seen[:, None]
    if mask == "none":
        causal = kind == "sdpa" and queries > 1  # as without a prefix; eager needs a mask
        seen = torch.ones((2, queries, keys), dtype=torch.bool)
        seen, given = (seen.tril() if causal else seen), None
    if mask == "longer":
        given = torch.cat([given, given], dim=-1)
    if given is not None and (kind == "eager" or mask == "additive"):
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    worn = Prefix(True, lambda: prefix)
    put_on(layer, worn)
    call = ALL_ATTENTION_FUNCTIONS.get_interface(layer.config._attn_implementation, None)
    output, weights = call(layer, query, *text, given, scaling=8**-0.5, dropout=0.0)
    take_off(layer, worn)
    assert layer.config._attn_implementation == kind
    expected = explicit(query, prefix, text, seen, torch.zeros((4, queries, keys)))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    if kind == "eager":
        assert weights.shape == (2, 4, queries, keys)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_position_bias_is_the_text_s_alone(kind, masked):
    layer = build("t5").encoder.block[0].layer[0].SelfAttention
    layer.config._attn_implementation = kind
    query, text = numbers((2, 4, 5, 8), 0), (numbers((2, 4, 5, 8), 1), numbers((2, 4, 5, 8), 2))
    prefix, bias = (numbers((4, TOKENS, 8), 3), numbers((4, TOKENS, 8), 4)), numbers((4, 5, 5), 5)
    seen = numbers((2, 5, 5), 6) > 0 if masked else torch.ones((2, 5, 5), dtype=torch.bool)
    mask = torch.zeros((2, 1, 5, 5)).masked_fill(~seen[:, None], -1e30) if masked else None
    put_on(layer, Prefix(True, lambda: prefix))
    call = ALL_ATTENTION_FUNCTIONS["stillroom_prefix"]
    output, _ = call(
        layer, query, *text, mask, scaling=8**-0.5, dropout=0.0, position_bias=bias[None]
    )
    expected = explicit(query, prefix, text, seen, bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FITTING)
def test_eager_and_sdpa_agree(kind):
    models = [build(kind), build(kind)]
    if kind == "t5":  # whose scores are not scaled: in float32 they round apart by more than 1e-4
        models = [model.double() for model in models]
    models[1].set_attn_implementation("eager")
    mask = torch.ones_like(words())
    mask[1, 4:] = 0
    parts = [put(model) for model in models]
    parts[1].take(parts[0].tensors())
    with torch.no_grad():
        first, second = (answer(model, words(), mask) for model in models)
    own = mask.bool() if first.dim() == 3 else slice(None)
    torch.testing.assert_close(first[own], second[own], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FITTING)
def test_padding_is_not_seen(kind):
    model = build(kind)
    put(model)
    ids, mask = words(), torch.ones_like(words())
    ids[1, 4:], mask[1, 4:] = 0, 0
    with torch.no_grad():
        padded, alone = answer(model, ids, mask)[1], answer(model, ids[1:2, :4])[0]
    padded = padded[:4] if padded.dim() == 2 else padded
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_same_numbers_as_peft_give_the_same_logits():
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        num_layers=2,
        token_dim=16,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    theirs = get_peft_model(tiny_llama(), config).eval()
    base = tiny_llama().requires_grad_(False)
    part = put(base, rows=False)
    cache = theirs.get_prompt(batch_size=1)
    tensors = {}
    for i, layer in enumerate(cache.layers):
        for name, value in (("keys", layer.keys), ("values", layer.values)):
            tensors[f"model/layers/{i}/self_attn/{name}"] = value[0].detach()
    part.take(tensors)
    part.wear(True)
    mask = torch.ones((4, TOKENS + 7), dtype=torch.long)
    with torch.no_grad():
        # peft's text begins behind the prefix, ours where it does without one.
        expected = theirs.base_model(
            input_ids=words(),
            attention_mask=mask,
            past_key_values=theirs.get_prompt(batch_size=4),
            position_ids=torch.arange(7)[None],
        ).logits
        torch.testing.assert_close(answer(base, words()), expected, rtol=1e-5, atol=1e-5)
        # Turned by as much, the same holds of its own forward pass.
        part.take(
            {
                name: _turned(base, tensor, -TOKENS) if name.endswith("keys") else tensor
                for name, tensor in tensors.items()
            }
        )
        theirs_whole = theirs(input_ids=words(), attention_mask=mask[:, TOKENS:]).logits
    assert not torch.allclose(theirs_whole, expected, atol=1e-2)
    torch.testing.assert_close(answer(base, words()), theirs_whole, rtol=1e-4, atol=1e-4)


def _turned(base, keys, by):
    """Return keys (heads, tokens, width) as they are `by` places further on."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = base.model.rotary_emb(keys, torch.full((1, keys.shape[1]), by))
    return apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[1][0]


@pytest.mark.parametrize("rows", [True, torch.tensor([1, 2])])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "t5"])
def test_generation_with_a_cache_is_that_without(kind, cache, rows):
    model = build(kind)
    put(model, rows)
    ids = words(4, 6)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    slow = model.generate(ids, use_cache=False, **options)
    fast = model.generate(ids, use_cache=True, cache_implementation=cache, **options)
    assert torch.equal(slow, fast)


def test_a_sliding_window_sees_the_prefix():
    model = build("mistral")
    model.model.layers = model.model.layers[:1]
    model.config.sliding_window = 4
    model.config.num_hidden_layers = 1
    part = put(model)
    with torch.no_grad():
        first = answer(model, words(2, 12))
        disturb(part)
        second = answer(model, words(2, 12))
    moved = (first - second).abs().amax(dim=(0, 2))
    assert (moved > 1e-2).all()


def test_encoder_makes_the_numbers_as_the_paper_does():
    shapes = {"a": (2, 3, 4), "b": (1, 3, 5)}
    encoder = PrefixEncoder(shapes, 6, 7, torch.Generator().manual_seed(0))
    made = encoder()
    for token in range(3):
        inner = torch.tanh(encoder.W1 @ encoder.embedding[token] + encoder.b1)
        flat = encoder.W2 @ inner + encoder.b2
        torch.testing.assert_close(made["a"][:, token].flatten(), flat[:8])
        torch.testing.assert_close(made["b"][:, token].flatten(), flat[8:])


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_of_an_encoder_its_numbers_are_saved_alone(kind):
    model = build(kind)
    part = put(model, width=4)
    losses = train(model, part)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    saved = part.tensors()
    with torch.no_grad():
        expected = answer(model, words())
    part.wear(False)
    for width in (4, None):
        other = put(model, width=width, seed=1)
        other.take(saved)
        assert len(list(other.parameters())) == len(saved)
        with torch.no_grad():
            assert torch.equal(answer(model, words()), expected)
        assert all(torch.equal(value, saved[name]) for name, value in other.tensors().items())
        losses = train(model, other, steps=2)
        assert losses[1] < losses[0]
        other.detach()


def test_an_encoder_runs_once_a_pass_and_once_for_all_in_evaluation(monkeypatch):
    runs = []
    forward = PrefixEncoder.forward
    monkeypatch.setattr(PrefixEncoder, "forward", lambda self: runs.append(1) or forward(self))
    model = build("llama")
    part = put(model, width=4)
    for _ in range(2):  # gradients add up without a step between them
        answer(model, words()).sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        first = [answer(model, words()) for _ in range(3)]
        assert len(runs) == 3
        part.encoder.b2.add_(1)
        assert not torch.equal(answer(model, words()), first[0])
    assert len(runs) == 4


@pytest.mark.parametrize("rows", [True, torch.tensor([1, 2])])
def test_gradients_with_activations_made_again(rows):
    gradients = []
    for again in (False, True):
        model = build("llama").train()
        part = put(model, rows, width=4)
        with recomputing(model, wanted=again):
            answer(model, words()).square().sum().backward()
        gradients.append([p.grad for p in part.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_values_that_do_not_fit_are_refused():
    part = put(build("llama"))
    with pytest.raises(SourceError, match="do not fit"):
        put(build("gpt2"), width=4).take(part.tensors())


def test_half_precision_keeps_its_type_and_the_prefix_its_own():
    model = build("llama").to(torch.bfloat16)
    part = put(model)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    for rows in (True, torch.tensor([1])):
        part.wear(rows)
        assert answer(model, words()).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [None, 4])
def test_seed_decides_and_global_random_numbers_do_not(width):
    model = build("llama")
    before = torch.random.get_rng_state()
    parts = [put(model, False, width, seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, same, other = (list(part.tensors().values()) for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_long_prefix_needs_no_positions():
    model = build("gpt2")  # 64 positions
    part = PrefixAdapter(model, PrefixOptions(100), 0)
    part.wear(True)
    assert {tensor.shape[1] for tensor in part.tensors().values()} == {100}
    assert torch.isfinite(answer(model, words())).all()


def test_keys_may_be_wider_than_values():
    model = tiny_deepseek()
    part = put(model)
    sizes = [tuple(tensor.shape) for tensor in part.tensors().values()]
    assert sizes == [(4, TOKENS, 16), (4, TOKENS, 8)] * 2
    losses = train(model, part)
    assert losses[-1] < losses[0]


def test_a_copy_of_a_base_that_wears_one_answers_the_same():
    model = build("llama")
    put(model)
    assert torch.equal(answer(copy.deepcopy(model), words()), answer(model, words()))


def test_model_that_attends_in_its_own_way_is_refused():
    with pytest.raises(RecipeError, match="BloomForCausalLM do not"):
        put(build("bloom"))


def test_function_without_masks_is_refused():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RecipeError, match="attn_implementation='sdpa'"):
        put(model)
    assert model.model.layers[0].self_attn.config is model.config
