import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.errors import CorruptedError, RecipeError, SourceError
from stillroom.models import load_model
from stillroom.quantization.formats.export import check_folder, save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.quantization.test_sequential import MODELS, logits, rows
from tests.stillroom.tiny import tiny_bert_masked, tiny_llama, tiny_tokenizer

TASKS = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "sequence_classification"}


def _saved(folder, kind="llama", options=None, skip=()):
    model = MODELS[kind](hidden=64)
    options = options or QuantizationOptions(4, 32)
    result = quantize_model(model, rows(), options, skip=skip)
    save_quantized(model, tiny_tokenizer(), result, folder)
    return model, result


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_a_fresh_load_gives_the_same_logits(tmp_path, kind, weights, bits, symmetric):
    model, result = _saved(tmp_path, kind, QuantizationOptions(bits, 32, symmetric))
    loaded = load_quantized(tmp_path, task=TASKS[kind], weights=weights)
    expected, came = logits(model, rows()), logits(loaded, rows())
    # Packed, the product is summed in another order.
    bound = 0 if weights == "dense" else 1e-5
    assert (came - expected).abs().max() <= bound * expected.abs().max()
    packed = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == (len(result.layers) if weights == "packed" else 0)
    assert not loaded.training


def test_load_model_reads_the_folder_too(tmp_path):
    model, _ = _saved(tmp_path)
    for weights in ("packed", "dense"):
        loaded = load_model(tmp_path, weights=weights)
        torch.testing.assert_close(
            logits(loaded, rows()), logits(model, rows()), rtol=1e-5, atol=1e-5
        )


def test_the_folder_is_a_gptq_checkpoint(tmp_path):
    _, result = _saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    section = config["quantization_config"]
    assert section["quant_method"] == "gptq"
    assert section["checkpoint_format"] == "gptq"
    assert (section["bits"], section["group_size"]) == (4, 32)
    assert (section["sym"], section["desc_act"]) == (False, False)
    assert section["block_name_to_quantize"] == "model.layers"
    assert section["meta"]["quantizer"][0].startswith("stillroom:")
    assert (tmp_path / "tokenizer.json").exists()
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert state[f"{name}.qweight"].shape == (128 * 4 // 32, 64)
    assert state[f"{name}.scales"].shape == (4, 64)
    assert f"{name}.weight" not in state
    assert "lm_head.weight" not in state  # tied to the embeddings
    assert len([key for key in state if key.endswith(".qweight")]) == len(result.layers)


def test_transformers_accepts_the_section(tmp_path):
    from transformers import AutoConfig, GPTQConfig

    _saved(tmp_path, options=QuantizationOptions(3, -1, damping=2.0), skip=("*.down_proj",))
    section = AutoConfig.from_pretrained(tmp_path).quantization_config
    read = GPTQConfig.from_dict(dict(section))
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (3, -1, False, False)
    listed = [name for names in read.modules_in_block_to_quantize for name in names]
    assert "model.layers.0.mlp.up_proj" in listed
    assert "model.layers.0.mlp.down_proj" not in listed


def test_skipped_layers_are_stored_as_they_are(tmp_path):
    model, result = _saved(tmp_path, skip=("*.down_proj",))
    loaded = load_quantized(tmp_path, weights="packed")
    torch.testing.assert_close(logits(loaded, rows()), logits(model, rows()), rtol=1e-5, atol=1e-5)
    for name in result.skipped:
        assert isinstance(loaded.get_submodule(name), torch.nn.Linear)


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama()
    result = quantize_model(model, rows(), QuantizationOptions(4, 16))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_quantized(model, None, result, tmp_path)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_the_same_work_writes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        _saved(tmp_path / name)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_packed_weights_can_be_computed_in_bfloat16(tmp_path):
    model, _ = _saved(tmp_path)
    loaded = load_quantized(tmp_path, dtype=torch.bfloat16, weights="packed")
    came = logits(loaded, rows())
    assert came.dtype == torch.bfloat16
    expected = logits(model, rows())
    assert (came.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_missing_tensor_is_reported(tmp_path):
    _saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key, text in (
        ("model.layers.1.mlp.up_proj.scales", "up_proj lacks scales"),
        ("model.norm.weight", "missing"),
    ):
        fewer = {name: value for name, value in state.items() if name != key}
        save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptedError, match=text):
            load_quantized(tmp_path)


def test_another_format_is_refused(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"checkpoint_format": "marlin"}
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match="marlin"):
        load_quantized(tmp_path)


def test_a_truncated_file_is_reported(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptedError, match=r"model\.safetensors"):
        load_quantized(tmp_path)


def test_how_a_model_generates_is_kept(tmp_path):
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, 7]
    result = quantize_model(model, rows(), QuantizationOptions(4, 16))
    save_quantized(model, None, result, tmp_path)
    assert load_quantized(tmp_path).generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_a_masked_model_keeps_its_head_dense(tmp_path, embedding_bits, weights):
    model = tiny_bert_masked(hidden=64)
    head = {name: value.clone() for name, value in model.state_dict().items() if "cls." in name}
    options = QuantizationOptions(4, 32, embedding_bits=embedding_bits)
    result = quantize_model(model, rows(), options)
    save_quantized(model, tiny_tokenizer(), result, tmp_path)
    assert result.layers
    assert all(name.startswith("bert.encoder.layer.") for name in result.layers)
    loaded = load_quantized(tmp_path, task="masked_lm", weights=weights)
    kept = loaded.state_dict()
    for name in ("bias", "transform.dense.weight", "transform.LayerNorm.weight"):
        assert torch.equal(kept[f"cls.predictions.{name}"], head[f"cls.predictions.{name}"])
    expected, came = logits(model, rows()), logits(loaded, rows())
    assert (came - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert check_folder(tmp_path, result, "masked_lm", "cpu").relative < 1e-5


@pytest.mark.parametrize("weights", ["packed", "dense"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_embeddings_and_head_in_eight_bits(tmp_path, kind, weights):
    model, result = _saved(tmp_path, kind, QuantizationOptions(4, 32, embedding_bits=8))
    names = {"llama": "model.embed_tokens", "bert": "bert.embeddings.word_embeddings"}
    assert set(result.embeddings) == {names[kind]}  # the head is tied, or a classifier's
    state = load_file(tmp_path / "model.safetensors")
    assert f"{names[kind]}.qweight" in state
    assert f"{names[kind]}.weight" not in state
    loaded = load_quantized(tmp_path, task=TASKS[kind], weights=weights)
    expected = logits(model, rows())
    came = logits(loaded, rows())
    assert (came - expected).abs().max() <= 1e-5 * expected.abs().max()
    check = check_folder(tmp_path, result, TASKS[kind], "cpu")
    assert check.relative < 1e-5
    original = MODELS[kind](hidden=64)
    table = original.get_input_embeddings().weight
    rounded = loaded.get_input_embeddings().weight
    assert 0 < (table - rounded).abs().max() < table.abs().max() / 200


def test_embeddings_that_fit_no_group_are_refused():
    with pytest.raises(RecipeError, match="embedding_bits"):
        quantize_model(
            MODELS["llama"](hidden=48), rows(), QuantizationOptions(4, 16, embedding_bits=8)
        )
