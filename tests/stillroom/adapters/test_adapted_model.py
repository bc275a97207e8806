"""What holds of every method: one base, many adapters, none of which disturbs another."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as tf

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import load_adapter, load_into, save_adapter
from stillroom.adapters.options import (
    KINDS,
    BitFitOptions,
    BottleneckOptions,
    FullOptions,
    LoraOptions,
    PrefixOptions,
    PromptOptions,
    PTuningOptions,
    TopLayersOptions,
    as_fields,
    make_options,
    method_of,
)
from stillroom.adapters.training import train_adapter
from stillroom.errors import RecipeError, SourceError
from stillroom.fine_tuning import measure
from stillroom.quantization.linear import QuantizedLinear
from stillroom.training.history import HELD_OUT_LOSS
from stillroom.training.options import TrainingOptions
from tests.stillroom.adapters.quantized import quantize_blocks
from tests.stillroom.adapters.zoo import answer, build, words
from tests.stillroom.rows import labelled_rows, masked_rows, token_rows
from tests.stillroom.tiny import seeded, tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2
from tests.stillroom.tiny_mixtures import tiny_switch

OPTIONS = {
    "lora": LoraOptions(rank=2),
    "bottleneck": BottleneckOptions(width=4),
    "pfeiffer": BottleneckOptions(width=4, placement="pfeiffer"),
    "prefix_tuning": PrefixOptions(3, encoder_width=8),
    "p_tuning_v2": PrefixOptions(3),
    "prompt_tuning": PromptOptions(3),
    "p_tuning": PTuningOptions(((0, 2), (2, 1)), encoder_width=8),
    "p_tuning_mlp": PTuningOptions(((0, 2),), encoder="mlp", encoder_width=8),
    "bitfit": BitFitOptions(),
    "top_layers": TopLayersOptions(1),
    "full": FullOptions(),
}
# Of GPT-2 every method can do something; BERT is read in both directions.
MODELS = {
    "causal_lm": tiny_gpt2,
    "sequence_classification": tiny_bert_classifier,
    "masked_lm": tiny_bert_masked,
}
ROWS = {
    "causal_lm": lambda: token_rows(8, padding=3),
    "sequence_classification": lambda: labelled_rows(8),
    "masked_lm": lambda: masked_rows(vocab=8),
}
TRAINING = TrainingOptions(steps=8, batch_rows=4, learning_rate=2e-2)
LONGER = TrainingOptions(steps=40, batch_rows=4, learning_rate=5e-3)
every_method = pytest.mark.parametrize("method", OPTIONS)
every_task = pytest.mark.parametrize("task", MODELS)


@torch.no_grad()
def logits(model, task, **further):
    rows = ROWS[task]()
    return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **further).logits


def dressed(task, **adapters):
    """Return a base with these adapters, each trained for a few steps."""
    model = AdaptedModel(MODELS[task]())
    for number, (name, options) in enumerate(adapters.items()):
        model.add(name, options, task=task, seed=number)
        train_adapter(model, name, ROWS[task](), TRAINING)
    return model.eval()


def hooks_of(base):
    """Return how many hooks each module of a base has."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]


@torch.no_grad()
def disturb(part, seed):
    """Have a fresh adapter change something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in part.parameters():
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def tiny_deberta_with_shared_keys():
    """Return a DeBERTa whose blocks multiply the embeddings of positions, too, as v3's do."""
    config = tf.DebertaV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, share_att_key=True,
        norm_rel_ebd="layer_norm", position_buckets=16, max_relative_positions=-1,
    )  # fmt: skip
    return seeded(tf.DebertaV2ForSequenceClassification, config)


def test_every_method_is_tried():
    assert {method_of(options) for options in OPTIONS.values()} == set(KINDS)
    for options in OPTIONS.values():
        assert make_options(method_of(options), as_fields(options)) == options


@every_task
@every_method
def test_learns_and_leaves_the_base_as_it_was(method, task):
    model = AdaptedModel(MODELS[task]())
    before = copy.deepcopy(model.base.state_dict())
    plain = logits(model.eval(), task)
    model.add("a", OPTIONS[method], task=task)
    fresh = measure(model, ROWS[task](), 8)[HELD_OUT_LOSS]
    train_adapter(model, "a", ROWS[task](), LONGER)
    assert measure(model.eval(), ROWS[task](), 8)[HELD_OUT_LOSS] < fresh
    model.eval()
    assert not torch.equal(logits(model, task), plain)
    model.select(None)
    assert torch.equal(logits(model, task), plain)
    after = model.base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@every_task
@every_method
def test_saved_and_loaded_it_says_the_same_and_has_the_same_bytes(method, task, tmp_path):
    model = dressed(task, a=OPTIONS[method])
    for folder in ("one", "two"):
        save_adapter(model, "a", tmp_path / folder, "models:/base@champion")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    loaded = load_adapter(MODELS[task](), tmp_path / "one")
    assert torch.equal(logits(loaded, task), logits(model, task))
    save_adapter(loaded, "default", tmp_path / "again", "models:/base@champion")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()


@every_method
def test_after_learning_another_task_not_one_bit_of_the_first_has_changed(method):
    task = "sequence_classification"
    model = dressed(task, first=OPTIONS[method])
    before = logits(model, task)
    for name, options in OPTIONS.items():
        model.add(f"then-{name}", options, task=task, seed=5)
        train_adapter(model, f"then-{name}", ROWS[task](), TRAINING)
    model.eval()
    model.select("then-lora" if method != "lora" else "then-bottleneck")
    assert not torch.equal(logits(model, task), before)
    model.select("first")
    assert torch.equal(logits(model, task), before)


@every_task
def test_a_batch_mixes_all_tasks_and_the_base(task):
    names = [*OPTIONS, None]
    model = dressed(task, **OPTIONS)
    rows = ROWS[task]()
    count = len(rows)
    chosen = [names[i % len(names)] for i in range(2 * len(names))]
    ids = rows.input_ids.repeat(-(-len(chosen) // count), 1)[: len(chosen)]
    mask = rows.attention_mask.repeat(-(-len(chosen) // count), 1)[: len(chosen)]
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, adapter_names=chosen).logits
        for row, name in enumerate(chosen):
            model.select(name)
            alone = model(input_ids=ids, attention_mask=mask).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)


def test_what_is_selected_stays_so_after_a_mixed_batch():
    model = dressed("causal_lm", a=OPTIONS["lora"], b=OPTIONS["top_layers"])
    model.select("a")
    before = logits(model, "causal_lm")
    logits(model, "causal_lm", adapter_names=["a", "b", None, "b"] * 2)
    assert model.selected == "a"
    assert torch.equal(logits(model, "causal_lm"), before)


@pytest.mark.parametrize("worn", ["lora", "prefix_tuning", "p_tuning", "full"])
def test_what_is_worn_stays_when_another_is_removed_or_refused(worn, tmp_path):
    model = dressed("causal_lm", a=OPTIONS[worn], b=OPTIONS["bottleneck"])
    save_adapter(model, "b", tmp_path, "base")
    description = tmp_path / "stillroom_adapter.json"
    description.write_text(description.read_text().replace('"width": 4', '"width": 5'))
    model.select("a")
    before = logits(model, "causal_lm")
    hooks = hooks_of(model.base)

    with pytest.raises(SourceError, match="do not fit"):
        load_into(model, "c", tmp_path)
    assert model.selected == "a"
    with pytest.raises(RecipeError, match="at most 4"):
        model.add("c", TopLayersOptions(5))
    assert model.selected == "a"
    assert hooks_of(model.base) == hooks
    model.remove("b")
    assert model.selected == "a"
    assert torch.equal(logits(model, "causal_lm"), before)


def test_a_method_that_does_not_fit_leaves_no_hook():
    base = tiny_switch()
    hooks = hooks_of(base)
    model = AdaptedModel(base)
    with pytest.raises(RecipeError, match="use lora instead"):
        model.add("a", OPTIONS["bottleneck"])
    assert hooks_of(base) == hooks


@every_method
def test_on_a_base_that_is_evaluated_an_adapter_is_too(method, tmp_path):
    options, task = OPTIONS[method], "sequence_classification"
    if isinstance(options, LoraOptions):
        options = replace(options, dropout=0.5)
    model = AdaptedModel(MODELS[task]())
    model.add("a", options, task=task)
    train_adapter(model, "a", ROWS[task](), TRAINING)
    assert not any(module.training for module in model.modules())
    save_adapter(model, "a", tmp_path, "base")
    loaded = AdaptedModel(MODELS[task]())
    load_into(loaded, "a", tmp_path)
    assert torch.equal(logits(loaded, task), logits(loaded, task))
    assert AdaptedModel(MODELS[task]().train()).training


@every_method
def test_a_copy_of_the_model_is_its_own(method):
    model = dressed("sequence_classification", a=OPTIONS[method])
    twin = copy.deepcopy(model)
    before = logits(model, "sequence_classification")
    assert torch.equal(logits(twin, "sequence_classification"), before)
    with torch.no_grad():
        for parameter in twin.worn("a").method.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(logits(twin, "sequence_classification"), before)
    assert torch.equal(logits(model, "sequence_classification"), before)
    twin.select(None)
    assert torch.equal(logits(model, "sequence_classification"), before)


@every_method
def test_an_adapter_that_is_removed_leaves_nothing(method):
    model = AdaptedModel(MODELS["causal_lm"]()).eval()
    plain = logits(model, "causal_lm")
    hooks = hooks_of(model.base)
    model.add("a", OPTIONS[method])
    model.remove("a")
    assert torch.equal(logits(model, "causal_lm"), plain)
    assert hooks_of(model.base) == hooks


@every_method
def test_generates_what_it_predicts(method):
    model = dressed("causal_lm", a=OPTIONS[method])
    prompt = token_rows(1).input_ids[:, :6]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    expected = prompt
    with torch.no_grad():
        for _ in range(5):
            following = model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
    assert torch.equal(made, expected)


def test_rows_generate_with_adapters_of_their_own():
    model = dressed("causal_lm", a=OPTIONS["lora"], b=OPTIONS["bottleneck"], c=OPTIONS["full"])
    prompt = token_rows(3).input_ids[:3, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    mixed = model.generate(prompt, adapter_names=["a", None, "b"], **options)
    for row, name in enumerate(["a", None, "b"]):
        model.select(name)
        assert torch.equal(model.generate(prompt, **options)[row], mixed[row])
    with pytest.raises(RecipeError, match="one after another"):
        model.generate(prompt, adapter_names=["a", None, "c"], **options)


@pytest.mark.parametrize("method", OPTIONS)
def test_on_a_quantized_base_no_buffer_changes(method):
    model = AdaptedModel(quantize_blocks(tiny_bert_classifier()))
    before = copy.deepcopy(model.base.state_dict())
    task = "sequence_classification"
    plain = logits(model.eval(), task)
    model.add("a", OPTIONS[method], task=task)
    fresh = measure(model, ROWS[task](), 8)[HELD_OUT_LOSS]
    train_adapter(model, "a", ROWS[task](), LONGER)
    assert measure(model.eval(), ROWS[task](), 8)[HELD_OUT_LOSS] < fresh
    model.eval().select(None)
    assert torch.equal(logits(model, task), plain)
    assert all(torch.equal(v, before[name]) for name, v in model.base.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix_tuning", "prompt_tuning"])
def test_no_dense_weight_waits_for_the_backward_pass(method):
    base = quantize_blocks(tiny_llama(vocab=80))  # whose head is of no block's shape
    layers = [module for module in base.modules() if isinstance(module, QuantizedLinear)]
    dense = {shape for each in layers for shape in _both_ways(each.dequantize().shape)}
    model = AdaptedModel(base)
    model.add("a", OPTIONS[method])
    model.trainable("a")
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=token_rows(4).input_ids).logits.sum().backward()
    assert kept
    assert not dense & set(kept)
    assert all(p.grad is not None for p in model.worn("a").parameters())


def _both_ways(shape):
    return tuple(shape), tuple(reversed(shape))


@pytest.mark.parametrize(
    "told_by", ["option", "passed config", "own config", "own config beside a passed one"]
)
@pytest.mark.parametrize("ways", [{"num_beams": 2}, {"num_return_sequences": 3, "num_beams": 3}])
def test_beams_wear_what_their_row_wears(ways, told_by):
    model = dressed("causal_lm", a=OPTIONS["lora"], b=OPTIONS["bottleneck"])
    prompt = token_rows(3).input_ids[:3, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    match told_by:
        case "option":
            options |= ways
        case "passed config":
            options["generation_config"] = tf.GenerationConfig(**ways)
        case "own config":
            model.base.generation_config = tf.GenerationConfig(**ways)
        case _:
            model.base.generation_config = tf.GenerationConfig(**ways)
            options["generation_config"] = tf.GenerationConfig(use_cache=True)
    count = ways.get("num_return_sequences", 1)
    mixed = model.generate(prompt, adapter_names=["a", None, "b"], **options)
    for row, name in enumerate(["a", None, "b"]):
        model.select(name)
        own = slice(row * count, (row + 1) * count)
        assert torch.equal(model.generate(prompt, **options)[own], mixed[own])


@pytest.mark.parametrize("ways", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("lora", [None, "a"]),
        ("bottleneck", ["a", None]),
        ("bottleneck", [None, "a"]),
        ("prefix_tuning", ["a", None]),
        ("prefix_tuning", [None, "a"]),
        ("prompt_tuning", ["a", "a"]),
        ("full", ["a", "a"]),
    ],
)
def test_beams_of_an_encoder_decoder_wear_what_their_row_wears(method, names, ways):
    model = AdaptedModel(build("t5"))
    model.add("a", OPTIONS[method], seed=1)
    disturb(model.worn("a").method, 5)
    ids = words(2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | ways
    written = {"a": model.generate(ids, **options)}
    model.select(None)
    written[None] = model.generate(ids, **options)
    assert not torch.equal(written["a"], written[None])
    mixed = model.generate(ids, adapter_names=names, **options)
    count = len(mixed) // 2
    for row, name in enumerate(names):
        own = slice(row * count, (row + 1) * count)
        assert torch.equal(mixed[own], written[name][own])


@every_method
def test_rows_that_opt_flattens_go_through_their_own_adapter(method):
    model = AdaptedModel(build("opt"))
    model.add("a", OPTIONS[method], seed=1)
    train_adapter(model, "a", token_rows(8), TRAINING)
    model.eval()
    ids = token_rows(4).input_ids
    with torch.no_grad():
        worn = model(input_ids=ids).logits
        model.select(None)
        plain = model(input_ids=ids).logits
        mixed = model(input_ids=ids, adapter_names=["a", None, None, "a"]).logits
    torch.testing.assert_close(mixed[[0, 3]], worn[[0, 3]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[[1, 2]], plain[[1, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated")
@pytest.mark.parametrize("names", [["a", None, None], [None, "a", "b"]])
@pytest.mark.parametrize(
    ("kind", "method"), [("deberta", "lora"), ("deberta", "bitfit"), ("switch", "lora")]
)
def test_what_does_not_see_row_by_row_goes_through_a_pass_of_its_own(kind, method, names):
    base = {"deberta": tiny_deberta_with_shared_keys, "switch": tiny_switch}[kind]()
    model = AdaptedModel(base)
    for number, name in enumerate("ab"):
        model.add(name, OPTIONS[method])
        disturb(model.worn(name).method, number)
    ids = words(3)
    alone = {}
    with torch.no_grad():
        for name in ("a", "b", None):
            model.select(name)
            alone[name] = answer(model, ids)
        assert not torch.allclose(alone["a"], alone[None], atol=1e-2)
        more = {"decoder_input_ids": ids} if kind == "switch" else {}
        mixed = model(ids, adapter_names=names, **more).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)


def test_names_are_looked_up(tmp_path):
    model = dressed("causal_lm", a=OPTIONS["lora"])
    with pytest.raises(RecipeError, match="this one is taken"):
        model.add("a", OPTIONS["lora"])
    with pytest.raises(RecipeError, match="adapter b: the model has a; load it first"):
        model.select("b")
    with pytest.raises(RecipeError, match="each of 8 rows, 1 came"):
        logits(model, "causal_lm", adapter_names=["a"])
    save_adapter(model, "a", tmp_path, "base")
    load_into(model, "b", tmp_path)
    assert model.selected == "b"
