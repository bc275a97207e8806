import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import load_adapter, save_adapter
from stillroom.adapters.lora import shortest_endings, target_names
from stillroom.adapters.merge import merge_lora
from stillroom.adapters.options import LoraOptions
from stillroom.adapters.training import train_adapter
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


def fresh(kind, options=OPTIONS, seed=0):
    adapted = AdaptedModel(MODELS[kind]())
    adapted.add("a", options, task=TASKS[kind], seed=seed)
    return adapted.eval()


def trained(kind, **further):
    adapted = fresh(kind)
    history = train_adapter(adapted, "a", rows(kind), TRAINING, **further)
    return adapted.eval(), history


def disturb(adapted):
    """Give B, which starts as zero, random values."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".B"):
            parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapter_changes_nothing(kind):
    assert torch.equal(logits(fresh(kind), kind), logits(MODELS[kind](), kind))


@pytest.mark.parametrize("kind", MODELS)
def test_training_changes_the_adapter_alone(kind):
    base = MODELS[kind]().state_dict()
    adapted, history = trained(kind)
    assert history.loss[-1] < history.loss[0]
    assert all(torch.equal(value, base[name]) for name, value in adapted.base.state_dict().items())
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(name.startswith("adapters.a.") for name in trainable)
    assert any(".head." in name for name in trainable) == (kind == "bert")
    adapted.select(None)
    assert torch.equal(logits(adapted, kind), logits(MODELS[kind](), kind))


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["llama", "gpt2", "bert", "masked"]), st.integers(1, 8), st.floats(0.5, 32))
def test_merged_equals_unmerged(kind, rank, alpha):
    adapted = fresh(kind, LoraOptions(rank=rank, alpha=alpha))
    disturb(adapted)
    for parameter in adapted.parameters():
        parameter.data = parameter.data.double()
    expected = logits(adapted, kind)
    plain = logits(MODELS[kind](), kind)
    assert not torch.allclose(expected.float(), plain, atol=1e-2)
    merged = merge_lora(adapted, "a")
    assert type(merged) is type(MODELS[kind]())
    assert set(merged.state_dict()) == set(MODELS[kind]().state_dict())
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-5, atol=1e-5)


def test_merged_equals_unmerged_in_float32():
    adapted = fresh("llama")
    disturb(adapted)
    expected = logits(adapted)
    difference = (logits(merge_lora(adapted, "a")) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def test_update_is_ba_times_alpha_over_rank():
    adapted = fresh("llama")
    disturb(adapted)
    name = "model.layers.0.mlp.up_proj"
    before = adapted.base.get_submodule(name).weight.detach().clone()
    update = adapted.worn("a").method.updates[name.replace(".", "/")]
    expected = before + 8.0 / 2 * (update.B @ update.A).detach()
    torch.testing.assert_close(merge_lora(adapted, "a").get_submodule(name).weight, expected)


def test_quantized_base_refuses_to_merge():
    with pytest.raises(MismatchError, match="weights='dense'"):
        merge_lora(fresh("quantized"), "a")


def test_adapter_beside_quantized_layers_equals_the_one_beside_dense_layers():
    packed, dense = MODELS["quantized"](), MODELS["quantized"]()
    for block in dense.model.layers:
        for name, child in list(block.named_modules()):
            if hasattr(child, "to_linear"):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, child.to_linear())
    models = [AdaptedModel(model) for model in (packed, dense)]
    for model in models:
        model.add("a", OPTIONS)
        disturb(model)
    # Two orders of summation: each is as far from the sums in float64.
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-4)


def test_broken_adapter_is_not_merged():
    adapted = fresh("llama")
    next(p for n, p in adapted.named_parameters() if n.endswith(".A")).data[0, 0] = torch.nan
    before = copy.deepcopy(adapted.base.state_dict())
    with pytest.raises(NotFiniteError, match="finite"):
        merge_lora(adapted, "a")
    assert all(
        torch.equal(value, before[name]) for name, value in adapted.base.state_dict().items()
    )


@pytest.mark.parametrize("kind", MODELS)
def test_saved_adapter_loads_and_has_the_same_bytes_each_time(kind, tmp_path):
    adapted, _ = trained(kind)
    for name in ("a", "b"):
        save_adapter(adapted, "a", tmp_path / name, "models:/base@champion")
    content = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert content[0] == content[1]
    config = json.loads(content[0]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "models:/base@champion"
    assert config["target_modules"] == sorted(config["target_modules"])
    loaded = load_adapter(MODELS[kind](), tmp_path / "a")
    assert torch.equal(logits(loaded, kind), logits(adapted, kind))
    assert not loaded.training


# peft reads what transformers deprecates, and advises those who call it themselves.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "masked"])
def test_peft_loads_what_was_saved_and_we_load_what_peft_saves(kind, tmp_path):
    from peft import PeftModel

    adapted, _ = trained(kind)
    save_adapter(adapted, "a", tmp_path / "ours", "base")
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, kind), logits(adapted, kind), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert not (tmp_path / "theirs" / "stillroom_adapter.json").exists()
    loaded = load_adapter(MODELS[kind](), tmp_path / "theirs")
    assert torch.equal(logits(loaded, kind), logits(adapted, kind))


def test_what_peft_computes_and_we_do_not_is_refused(tmp_path):
    adapted, _ = trained("llama")
    save_adapter(adapted, "a", tmp_path, "base")
    (tmp_path / "stillroom_adapter.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(MismatchError, match="use_dora"):
        load_adapter(tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(SourceError, match="IA3"):
        load_adapter(tiny_llama(), tmp_path)


def test_seed_decides_the_adapter_and_global_random_numbers_do_not():
    def start(seed):
        torch.rand(seed + 1)
        adapted = fresh("llama", seed=seed)
        return next(p for n, p in adapted.named_parameters() if n.endswith(".A"))

    before = torch.random.get_rng_state()
    fresh("llama")
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
    expected = [f"{prefix}.{i}.{name}" for i, b in enumerate(dense) for name in find_linears(b)]
    assert target_names(model, None) == expected


def test_full_names_are_used_where_an_ending_is_found_outside_the_blocks():
    model = tiny_llama()
    names = target_names(model, None)
    assert "mlp.up_proj" in shortest_endings(model, names)
    model.extra = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(3, 3)})})
    assert shortest_endings(model, names) == sorted(names)


def test_chosen_targets_only():
    names = target_names(tiny_llama(), ("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    assert len(names) == 4


def test_unknown_target_and_no_rank_are_refused():
    with pytest.raises(RecipeError, match=r"query is not in the model.*self_attn\.q_proj"):
        fresh("llama", replace(OPTIONS, target_modules=("query",)))
    with pytest.raises(RecipeError, match="rank must be at least 1; 0 came"):
        LoraOptions(rank=0)
