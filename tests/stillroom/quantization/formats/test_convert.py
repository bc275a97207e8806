import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stillroom.errors import MismatchError, SourceError, StoreError
from stillroom.models import load_tokenizer, read_config
from stillroom.quantization.formats.convert import export_folder, measure_export, task_of
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.formats.gptq_versions import convert_gptq, convert_zeros
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.formats.shards import ShardWriter, new_folder
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.packing import pack, unpack
from stillroom.quantization.sequential import quantize_model
from stillroom.quantization.weight import QuantizedWeight
from tests.stillroom.quantization.test_sequential import MODELS, logits, rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer


def saved(folder, kind="llama", bits=4, group_size=32, symmetric=False, skip=()):
    """Quantize a tiny model, write its folder and return the model."""
    model = MODELS[kind](hidden=64)
    options = QuantizationOptions(bits=bits, group_size=group_size, symmetric=symmetric)
    save_quantized(
        model, tiny_tokenizer(), quantize_model(model, rows(), options, skip=skip), folder
    )
    return model


def test_the_task_is_read_off_the_class():
    assert task_of(["BertForMaskedLM"]) == "masked_lm"
    assert task_of(["BertForSequenceClassification"]) == "sequence_classification"
    assert task_of(["LlamaForCausalLM"]) == task_of(None) == "causal_lm"


def weight(seed, bits, low=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(smallest, *shape):
        return torch.randint(smallest, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = torch.rand(32, 4, generator=generator).half()
    return QuantizedWeight(draw(0, 32, 64), scales, draw(low, 32, 4), bits)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
def test_zero_points_go_to_the_other_version_and_back(seed, bits):
    given_weight = weight(seed, bits)
    first = pack(given_weight, "gptq")
    second = convert_zeros(first, bits, "gptq", "gptq_v2")
    assert torch.equal(second.qzeros, pack(given_weight, "gptq_v2").qzeros)
    assert torch.equal(unpack(second, bits, "gptq_v2").dequantize(), given_weight.dequantize())
    back = convert_zeros(second, bits, "gptq_v2", "gptq")
    assert torch.equal(back.qzeros, first.qzeros)
    assert convert_zeros(first, bits, "gptq", "gptq") is first


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_0_does_not_go_into_version_1(bits):
    packed = pack(weight(0, bits, low=0), "gptq_v2")
    packed.qzeros.zero_()
    with pytest.raises(MismatchError, match=r"zero points from 1: 128 of a\.layer are 0"):
        convert_zeros(packed, bits, "gptq_v2", "gptq", "a.layer")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, True)])
def test_version_2_computes_the_same_and_comes_back_byte_for_byte(tmp_path, kind, bits, symmetric):
    model = saved(tmp_path / "one", kind, bits, symmetric=symmetric)
    export_folder(tmp_path / "one", tmp_path / "two", "gptq_v2")
    assert open_quantized(tmp_path / "two").checkpoint_format == "gptq_v2"
    assert measure_export(tmp_path / "one", tmp_path / "two").max_difference == 0
    task = task_of(model.config.architectures)
    loaded = load_quantized(tmp_path / "two", task=task)
    assert torch.equal(logits(loaded, rows()), logits(model, rows()))
    export_folder(tmp_path / "two", tmp_path / "back", "gptq")
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("export_format", ["gptq_v2", "auto-gptq", "compressed-tensors"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_embeddings_in_8_bits_go_along(tmp_path, export_format, tied):
    model = tiny_llama(hidden=64)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.9)
    options = QuantizationOptions(group_size=32, embedding_bits=8)
    save_quantized(model, None, quantize_model(model, rows(), options), tmp_path / "ours")
    assert "model.embed_tokens" in open_quantized(tmp_path / "ours").layers
    export_folder(tmp_path / "ours", tmp_path / "new", export_format)
    assert measure_export(tmp_path / "ours", tmp_path / "new").relative <= 1e-6


def test_a_comparison_notices_a_wrong_zero_point(tmp_path):
    saved(tmp_path / "one")
    export_folder(tmp_path / "one", tmp_path / "two", "gptq_v2")
    path = tmp_path / "two" / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up_proj.qzeros"] += 0x11111111
    save_file(state, path, metadata={"format": "pt"})
    assert measure_export(tmp_path / "one", tmp_path / "two").relative > 1e-3


def test_shards_hold_what_one_file_would_and_never_more_than_their_size(tmp_path):
    saved(tmp_path / "one")
    convert_gptq(tmp_path / "one", tmp_path / "two", "gptq_v2", shard_bytes=20_000)
    files = sorted((tmp_path / "two").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        assert len(names) == 1 or path.stat().st_size < 20_000 + 200 * len(names)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(tmp_path / "one" / "model.safetensors"))
    assert measure_export(tmp_path / "one", tmp_path / "two").max_difference == 0


def test_a_writer_of_one_shard_makes_no_index(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(2, 3).T)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(3, 2))


def test_nothing_is_left_of_a_failed_export(tmp_path):
    saved(tmp_path / "one", bits=3)
    with pytest.raises(MismatchError, match="holds 2, 4 and 8 bits"):
        export_folder(tmp_path / "one", tmp_path / "two", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    saved(tmp_path / "one")
    with pytest.raises(StoreError, match=r"empty or a new folder and it holds config\.json"):
        export_folder(tmp_path / "one", tmp_path / "one", "gptq_v2")
    with pytest.raises(SourceError, match="lies inside"):
        export_folder(tmp_path / "one", tmp_path / "one" / "two", "gptq_v2")
    (tmp_path / "empty").mkdir()
    export_folder(tmp_path / "one", tmp_path / "empty", "gptq_v2")
    assert (tmp_path / "empty" / "tokenizer.json").exists()


def test_a_dense_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(SourceError, match="expected a GPTQ checkpoint"):
        export_folder(tmp_path / "dense", tmp_path / "two", "gptq_v2")


def test_what_contradicts_the_new_config_is_left_behind(tmp_path):
    (tmp_path / "one").mkdir()
    left = ("quantize_config.json", "model.safetensors", "config.json", "pytorch_model.bin")
    index = "gptq_model-4bit-32g.safetensors.index.json"  # auto-gptq's, of shards that do not come
    for name in (*left, "vocab.txt", index):
        (tmp_path / "one" / name).write_text("x")
    with new_folder(tmp_path / "one", tmp_path / "two") as written:
        assert [path.name for path in written.iterdir()] == ["vocab.txt"]
    assert (tmp_path / "two" / "vocab.txt").exists()


@pytest.mark.parametrize("export_format", ["gptq_v2", "auto-gptq", "compressed-tensors"])
def test_all_chat_templates_go_along(tmp_path, export_format):
    saved(tmp_path / "one")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "one")
    export_folder(tmp_path / "one", tmp_path / "two", export_format)
    assert load_tokenizer(tmp_path / "two").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("export_format", ["gptq", "auto-gptq"])
def test_the_version_is_said_once(tmp_path, export_format):
    """gptqmodel writes it under two names, and reads the newer one."""
    saved(tmp_path / "one")
    export_folder(tmp_path / "one", tmp_path / "two", "gptq_v2")
    config = read_config(tmp_path / "two")
    config["quantization_config"]["format"] = "gptq_v2"
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    export_folder(tmp_path / "two", tmp_path / "three", export_format)
    section = read_config(tmp_path / "three")["quantization_config"]
    assert section["checkpoint_format"] == "gptq"
    assert section.get("format", "gptq") == "gptq"
