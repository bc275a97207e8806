import copy
from dataclasses import replace

import pytest
import torch

from stillroom.adapters.lora import LoraAdapter
from stillroom.adapters.options import LoraOptions
from stillroom.checkpoint import FolderCheckpoints
from stillroom.data.examples import Examples
from stillroom.errors import (
    CorruptedError,
    MismatchError,
    RecipeError,
    SourceError,
    StageError,
)
from stillroom.fine_tuning import fine_tune
from stillroom.intrinsic_dimension.artifact import (
    load_base,
    load_subspace,
    load_with_base,
    save_subspace,
)
from stillroom.intrinsic_dimension.subspace import (
    SubspaceModel,
    SubspaceOptions,
    layer_groups,
    lora_parameters_a_rank,
)
from stillroom.models import save_model
from stillroom.training.options import TrainingOptions
from tests.stillroom.adapters.quantized import quantize_blocks
from tests.stillroom.rows import labelled_rows, masked_rows, token_rows
from tests.stillroom.tiny import (
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_llama,
    tiny_tokenizer,
)
from tests.stillroom.tiny_decoders import tiny_gpt2

MODELS = {
    "llama": (tiny_llama, token_rows),
    "gpt2": (tiny_gpt2, token_rows),
    "bert": (tiny_bert_classifier, labelled_rows),
    "masked": (tiny_bert_masked, lambda: masked_rows(vocab=8)),
}
KINDS = sorted(MODELS)
OPTIONS = SubspaceOptions(dimension=24, seed=3)
AWARE = replace(OPTIONS, structure_aware=True)
TRAINING = TrainingOptions(steps=6, batch_rows=2, learning_rate=0.05, checkpoint_every_steps=2)


def logits(model: torch.nn.Module, rows: Examples) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits


def moved(model: SubspaceModel, seed: int = 0) -> SubspaceModel:
    with torch.no_grad():
        model.vector.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_and_its_gradient_is_that_of_all_parameters(kind: str) -> None:
    make, make_rows = MODELS[kind]
    rows = make_rows()
    base = make()
    expected = logits(base, rows)
    model = SubspaceModel(make(), OPTIONS).eval()
    torch.testing.assert_close(logits(model, rows), expected)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["vector"]

    def loss(which: torch.nn.Module) -> torch.Tensor:
        out = which(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        return out.square().mean()

    loss(model).backward()
    loss(base).backward()
    gradients = [
        torch.zeros_like(value) if value.grad is None else value.grad for value in base.parameters()
    ]
    whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
    assert whole.numel() == model.size
    expected = model.projection.transposed_product(whole)
    torch.testing.assert_close(model.vector.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [OPTIONS, AWARE], ids=["plain", "aware"])
def test_the_parameters_are_those_of_the_formula(kind: str, options: SubspaceOptions) -> None:
    make, make_rows = MODELS[kind]
    model = moved(SubspaceModel(make(), options))
    reference = make()
    groups = layer_groups([name for name, _ in reference.named_parameters()])
    order = list(dict.fromkeys(groups.values())) if options.structure_aware else []
    directions = options.dimension - len(order)
    offsets = model.projection.product(model.vector.detach()[:directions])
    start = 0
    with torch.no_grad():
        for name, value in reference.named_parameters():
            part = offsets[start : start + value.numel()].view(value.shape)
            start += value.numel()
            scale = 1 + model.vector[directions + order.index(groups[name])] if order else 1
            value.add_(scale * part)
    rows = make_rows()
    torch.testing.assert_close(logits(model, rows), logits(reference, rows), rtol=1e-4, atol=1e-4)
    before = logits(model, rows)
    merged = model.merged()
    torch.testing.assert_close(logits(merged, rows), before)
    assert merged is model.base


def test_scales_get_their_gradient() -> None:
    model = moved(SubspaceModel(tiny_llama(), AWARE)).train()
    rows = token_rows()
    model(input_ids=rows.input_ids).logits.square().mean().backward()
    assert len(set(model.groups.values())) == 3  # two blocks, and what lies beside
    step = torch.zeros_like(model.vector)
    step[-1] = 1e-2

    def loss(sign: int) -> float:
        other = SubspaceModel(tiny_llama(), AWARE)
        with torch.no_grad():
            other.vector.copy_(model.vector + sign * step)
            return float(other(input_ids=rows.input_ids).logits.double().square().mean())

    slope = (loss(1) - loss(-1)) / 2e-2
    assert float(model.vector.grad[-1]) == pytest.approx(slope, rel=0.02)


def test_layers_are_numbered_blocks_and_what_lies_beside() -> None:
    names = [name for name, _ in tiny_bert_classifier().named_parameters()]
    assert list(dict.fromkeys(layer_groups(names).values())) == [
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "bert.pooler",
        "classifier",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_one_loop_trains_it_and_a_resumed_run_ends_the_same(kind: str, tmp_path) -> None:
    make, make_rows = MODELS[kind]
    rows = make_rows()
    whole = SubspaceModel(make(), OPTIONS)
    start = copy.deepcopy(dict(whole.base.named_parameters()))
    history = fine_tune(whole, rows, replace(TRAINING, steps=30), evaluation=rows)
    assert min(history.loss[-6:]) < history.loss[0]
    assert history.kept()
    for name, value in whole.base.named_parameters():
        assert torch.equal(value, start[name])

    class Stop(Exception):
        pass

    def stop(done: int, total: int, unit: str, note: str = "") -> None:
        if done == 4:
            raise Stop

    whole = SubspaceModel(make(), OPTIONS)
    fine_tune(whole, rows, TRAINING)
    kept = FolderCheckpoints(tmp_path)
    with pytest.raises(Stop):
        fine_tune(SubspaceModel(make(), OPTIONS), rows, TRAINING, checkpoints=kept, progress=stop)
    assert kept.names() == ["step-00000004"]
    resumed = SubspaceModel(make(), OPTIONS)
    fine_tune(resumed, rows, TRAINING, checkpoints=kept)
    assert torch.equal(resumed.vector, whole.vector)


def test_half_precision_leaves_the_projection_in_full() -> None:
    rows, training = token_rows(), replace(TRAINING, dtype="bfloat16")
    model = SubspaceModel(tiny_llama(), OPTIONS)
    whole = SubspaceModel(tiny_llama(), OPTIONS)
    history = fine_tune(model, rows, training)
    assert history.loss == pytest.approx(fine_tune(whole, rows, TRAINING).loss, rel=0.02)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model.eval().moved_parameters()
    model.train()
    with torch.no_grad():
        plain = model.eval().moved_parameters()
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


def test_what_is_kept_in_evaluation_follows_the_vector() -> None:
    rows = token_rows()
    model = SubspaceModel(tiny_llama(), OPTIONS).eval()
    first = logits(model, rows)
    with torch.no_grad():
        assert model.moved_parameters() is model.moved_parameters()
    moved(model)
    assert not torch.allclose(logits(model, rows), first)


def test_what_cannot_be_moved_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a quantized one came.*measure the dense model"):
        SubspaceModel(quantize_blocks(tiny_llama()), OPTIONS)
    with pytest.raises(RecipeError, match=r"3 of the dimensions scale .* 3 came; raise .* to 4"):
        SubspaceModel(tiny_llama(), replace(AWARE, dimension=3))
    with pytest.raises(StageError, match="no parameter of the base requires a gradient"):
        SubspaceModel(tiny_llama().requires_grad_(False), OPTIONS)
    model = SubspaceModel(tiny_llama(), OPTIONS)
    training = replace(TRAINING, gradient_checkpointing=True)
    with pytest.raises(RecipeError, match="gradient_checkpointing: SubspaceModel cannot"):
        fine_tune(model, token_rows(), training)


def test_lora_parameters_are_counted_as_lora_makes_them() -> None:
    for make in (tiny_llama, tiny_gpt2):
        a_rank = lora_parameters_a_rank(make())
        adapter = LoraAdapter(make(), LoraOptions(rank=3), seed=0)
        trained = sum(value.numel() for value in adapter.parameters())
        assert trained == 3 * a_rank


@pytest.mark.parametrize("options", [OPTIONS, AWARE, replace(OPTIONS, projection="sparse")])
def test_an_adapter_is_d_floats_and_loads_as_it_was(options: SubspaceOptions, tmp_path) -> None:
    rows = token_rows()
    model = moved(SubspaceModel(tiny_llama(), options))
    save_subspace(model, tmp_path / "a", "models:/base/1")
    save_subspace(model, tmp_path / "b", "models:/base/1")
    weights = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    assert 4 * options.dimension < len(weights) < 4 * options.dimension + 200
    loaded = load_subspace(tiny_llama(), tmp_path / "a", base_reference="models:/base/1")
    assert torch.equal(logits(loaded, rows), logits(model, rows))


def test_another_base_shape_or_revision_is_refused_by_name(tmp_path) -> None:
    save_subspace(moved(SubspaceModel(tiny_llama(), OPTIONS)), tmp_path, "models:/base/1")
    with pytest.raises(MismatchError, match=r"another base: models:/base/1 expected, other"):
        load_subspace(tiny_llama(), tmp_path, base_reference="other")
    with pytest.raises(MismatchError, match=r"another base: a LlamaForCausalLM .* GPT2LMHeadModel"):
        load_subspace(tiny_gpt2(), tmp_path)
    for changes in ({"layers": 3}, {"vocab": 65}, {"hidden": 64}):
        with pytest.raises(MismatchError, match="base of another shape"):
            load_subspace(tiny_llama(**changes), tmp_path)
    with pytest.raises(MismatchError, match="another revision of its base"):
        load_subspace(tiny_llama(seed=1), tmp_path)
    nudged = tiny_llama()
    with torch.no_grad():
        nudged.model.norm.weight[0] += 1e-6
    with pytest.raises(MismatchError, match="another revision of its base"):
        load_subspace(nudged, tmp_path)


def test_damaged_or_foreign_folders_are_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match="holds no trained subspace"):
        load_subspace(tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(SourceError, match=r"expected method 'subspace' .* 'LORA' came"):
        load_subspace(tiny_llama(), tmp_path)
    small, large = tmp_path / "small", tmp_path / "large"
    save_subspace(SubspaceModel(tiny_llama(), OPTIONS), small, "x")
    save_subspace(SubspaceModel(tiny_llama(), replace(OPTIONS, dimension=25)), large, "x")
    weights = "adapter_model.safetensors"
    (small / weights).write_bytes((large / weights).read_bytes())
    with pytest.raises(CorruptedError, match=r"holds \(25,\) numbers, its config says 24"):
        load_subspace(tiny_llama(), small)


def test_a_new_head_comes_back_from_its_seed(tmp_path) -> None:
    names = ("a", "b", "c")
    encoder = tiny_bert_classifier().bert
    save_model(encoder, tiny_tokenizer(), tmp_path / "base")
    task = "sequence_classification"
    base = load_base(tmp_path / "base", task=task, label_names=names, head_seed=5)
    model = moved(SubspaceModel(base, OPTIONS))
    save_subspace(model, tmp_path / "adapter", "x", label_names=names, head_seed=5)
    rows = labelled_rows()
    loaded = load_with_base(tmp_path / "adapter", tmp_path / "base", task=task)
    assert torch.equal(logits(loaded, rows), logits(model, rows))
    other = load_base(tmp_path / "base", task=task, label_names=names, head_seed=6)
    with pytest.raises(MismatchError, match="another revision"):
        load_subspace(other, tmp_path / "adapter")
