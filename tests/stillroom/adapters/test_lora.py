import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillroom.adapters.lora import (
    LoraOptions,
    add_lora,
    load_adapter,
    save_adapter,
    target_names,
    train_lora,
)
from stillroom.adapters.merge import merge_lora
from stillroom.blocks import find_blocks, find_linears
from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import MismatchError, NotFiniteError, RecipeError, SourceError
from stillroom.training.options import TrainingOptions
from tests.stillroom.adapters.quantized import quantize_blocks
from tests.stillroom.rows import labelled_rows, masked_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2

MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert_classifier,
    "masked": tiny_bert_masked,
    "quantized": lambda: quantize_blocks(tiny_llama()),
}
TASKS = dict.fromkeys(MODELS, "causal_lm") | {
    "bert": "sequence_classification",
    "masked": "masked_lm",
}
ROWS = {"bert": labelled_rows, "masked": lambda: masked_rows(vocab=8)}
OPTIONS = LoraOptions(rank=2, alpha=8.0)
TRAINING = TrainingOptions(steps=8, batch_rows=2, learning_rate=2e-2, checkpoint_every_steps=3)


def rows(kind):
    return ROWS.get(kind, token_rows)()


def logits(model, kind="llama"):
    with torch.no_grad():
        return model(input_ids=rows(kind).input_ids).logits


def trained(kind, **further):
    model = MODELS[kind]()
    adapted, history = train_lora(model, rows(kind), OPTIONS, TRAINING, **further)
    return adapted.eval(), history


def disturb(adapted):
    """Give B, which starts as zero, random values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapter_changes_nothing(kind):
    expected = logits(MODELS[kind](), kind)
    adapted = add_lora(MODELS[kind](), OPTIONS, task=TASKS[kind])
    assert torch.equal(logits(adapted.eval(), kind), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_training_changes_the_adapter_alone(kind):
    base = MODELS[kind]().state_dict()
    adapted, history = trained(kind)
    assert history.loss[-1] < history.loss[0]
    for name, value in adapted.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        plain = plain.replace(".original_module", "")
        if plain in base:
            assert torch.equal(value, base[plain])
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert any("modules_to_save" in name for name in trainable) == (kind == "bert")


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["llama", "gpt2", "bert", "masked"]), st.integers(1, 8), st.floats(0.5, 32))
def test_merged_equals_unmerged(kind, rank, alpha):
    options = LoraOptions(rank=rank, alpha=alpha)
    adapted = add_lora(MODELS[kind](), options, task=TASKS[kind]).eval()
    disturb(adapted)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.double()
    expected = logits(adapted, kind)
    plain = logits(MODELS[kind](), kind)
    assert not torch.allclose(expected.float(), plain, atol=1e-2)
    merged = merge_lora(adapted)
    assert type(merged) is type(MODELS[kind]())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-5, atol=1e-5)


def test_update_is_ba_times_alpha_over_rank():
    model = tiny_llama()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted = add_lora(model, OPTIONS)
    disturb(adapted)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = before + 8.0 / 2 * (b @ a).detach()
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight.detach(), expected)


def test_quantized_base_refuses_to_merge():
    adapted = add_lora(MODELS["quantized"](), OPTIONS)
    with pytest.raises(MismatchError, match="weights='dense'"):
        merge_lora(adapted)


def test_adapter_beside_quantized_layers_equals_the_one_beside_dense_layers():
    packed, dense = MODELS["quantized"](), MODELS["quantized"]()
    for block in dense.model.layers:
        for name, child in list(block.named_modules()):
            if hasattr(child, "to_linear"):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, child.to_linear())
    models = [add_lora(model, OPTIONS) for model in (packed, dense)]
    for model in models:
        disturb(model)
    # Two orders of summation: each is as far from the sums in float64.
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-4)
    with models[0].disable_adapter():
        torch.testing.assert_close(logits(models[0]), logits(MODELS["quantized"]()))


def test_broken_adapter_is_not_merged():
    adapted = add_lora(tiny_llama(), OPTIONS)
    next(p for n, p in adapted.named_parameters() if "lora_A" in n).data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="finite"):
        merge_lora(adapted)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_adapter_loads_and_has_the_same_bytes_each_time(kind, tmp_path):
    adapted, _ = trained(kind)
    for name in ("a", "b"):
        save_adapter(adapted, tmp_path / name, "models:/base@champion")
    content = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert content[0] == content[1]
    assert sorted(content[0]) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(content[0]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "models:/base@champion"
    assert config["target_modules"] == sorted(config["target_modules"])
    loaded = load_adapter(MODELS[kind](), tmp_path / "a")
    assert torch.equal(logits(loaded, kind), logits(adapted, kind))
    assert not loaded.training


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_what_was_saved(tmp_path):
    from peft import PeftModel

    adapted, _ = trained("llama")
    save_adapter(adapted, tmp_path, "base")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_seed_decides_the_adapter_and_global_random_numbers_do_not():
    def start(seed):
        torch.rand(seed + 1)
        adapted = add_lora(tiny_llama(), OPTIONS, seed=seed)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    before = torch.random.get_rng_state()
    add_lora(tiny_llama(), OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_training_resumes_to_the_same_bytes(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total, unit, note=""):
        if done == 5:
            raise Stopped

    whole, _ = trained("quantized")
    checkpoints = FolderCheckpoints(tmp_path)
    with pytest.raises(Stopped):
        trained("quantized", checkpoints=checkpoints, progress=stop)
    assert checkpoints.names() == ["step-00000003"]
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    size = sum(p.numel() for p in whole.parameters() if p.requires_grad) * 4
    assert files < 3 * size + 50_000  # neither the base nor its moments are in it
    resumed, _ = trained("quantized", checkpoints=checkpoints)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", MODELS)
def test_every_linear_in_the_blocks_is_adapted_and_none_outside(kind):
    model = MODELS[kind]()
    prefix, blocks = find_blocks(tiny_llama() if kind == "quantized" else model)
    dense = find_blocks(tiny_llama())[1] if kind == "quantized" else blocks
    expected = {f"{prefix}.{i}.{name}" for i, b in enumerate(dense) for name in find_linears(b)}
    adapted = add_lora(copy.deepcopy(model), OPTIONS, task=TASKS[kind])
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == expected


def test_full_names_are_used_where_an_ending_is_found_outside_the_blocks():
    model = tiny_llama()
    model.extra = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(3, 3)})})
    names = target_names(model, None)
    assert "model.layers.1.mlp.up_proj" in names
    assert not any(name.startswith("extra") for name in names)


def test_chosen_targets_only():
    adapted = add_lora(tiny_llama(), replace(OPTIONS, target_modules=("q_proj", "v_proj")))
    found = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "v_proj"}
    assert len(found) == 4


def test_unknown_target_is_refused_with_the_choices():
    with pytest.raises(RecipeError, match=r"query is not in the model.*self_attn\.q_proj"):
        add_lora(tiny_llama(), replace(OPTIONS, target_modules=("query",)))


def test_folder_without_an_adapter_or_for_another_base_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"adapter_config\.json is missing"):
        load_adapter(tiny_llama(), tmp_path)
    adapted, _ = trained("llama")
    save_adapter(adapted, tmp_path, "base")
    with pytest.raises(SourceError, match="does not fit"):
        load_adapter(tiny_llama(hidden=16), tmp_path)
    with pytest.raises(SourceError, match="does not fit"):
        load_adapter(tiny_bert_classifier(), tmp_path)
