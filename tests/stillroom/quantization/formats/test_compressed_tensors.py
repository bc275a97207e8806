"""Exports in the format of compressed-tensors, read by transformers with that package."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stillroom.errors import MismatchError
from stillroom.quantization.formats.compressed_tensors import (
    Scheme,
    export_compressed_tensors,
    quantization_section,
)
from stillroom.quantization.formats.convert import export_folder, measure_export
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.formats.shards import ShardWriter, new_folder, write_config
from stillroom.quantization.packing import pack
from tests.stillroom.quantization.formats.test_convert import saved, weight
from tests.stillroom.quantization.test_sequential import logits, rows

# torch's own, at the import of a module that compressed-tensors asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

NAME = "model.layers.0.mlp.down_proj"
CHOICES = [
    (4, 32, True), (4, 32, False), (4, -1, False), (8, 64, True), (8, -1, True), (8, 32, False),
    (2, 32, True), (2, 16, False),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CHOICES)
def test_transformers_loads_it_and_gives_our_logits(tmp_path, kind, bits, group_size, symmetric):
    saved(tmp_path / "ours", kind, bits, group_size, symmetric)
    export_folder(tmp_path / "ours", tmp_path / "theirs", "compressed-tensors")
    assert measure_export(tmp_path / "ours", tmp_path / "theirs").relative <= 1e-3


def test_plain_from_pretrained_reads_packed_integers(tmp_path):
    model = saved(tmp_path / "ours")
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    names = dict(loaded.get_submodule(NAME).named_parameters())
    assert names["weight_packed"].dtype == torch.int32
    assert "weight" not in names
    difference = (logits(loaded, rows()) - logits(model, rows())).abs().max()
    assert difference <= 1e-3 * logits(model, rows()).abs().max()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]))
def test_the_librarys_unpacking_gives_our_weight(seed, bits):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    ours = weight(seed, bits, low=0)
    packed = pack(ours, "gptq_v2")
    middle = 2 ** (bits - 1)
    integers = unpack_from_int32(packed.qweight.T, bits, torch.Size([32, 64]))
    assert torch.equal(integers.int() + middle, ours.integers.int())
    zeros = unpack_from_int32(packed.qzeros.T, bits, torch.Size([32, 4]), packed_dim=0)
    assert torch.equal(zeros.int() + middle, ours.zeros.int())


@pytest.mark.parametrize("symmetric", [True, False])
def test_names_shapes_and_types_are_those_of_the_format(tmp_path, symmetric):
    saved(tmp_path / "ours", symmetric=symmetric)
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    assert state[f"{NAME}.weight_packed"].shape == (64, 128 * 4 // 32)
    assert state[f"{NAME}.weight_scale"].shape == (64, 4)
    assert state[f"{NAME}.weight_scale"].dtype == torch.float16
    assert state[f"{NAME}.weight_shape"].tolist() == [64, 128]
    assert (f"{NAME}.weight_zero_point" in state) != symmetric
    if not symmetric:
        assert state[f"{NAME}.weight_zero_point"].shape == (64 * 4 // 32, 4)
        assert state[f"{NAME}.weight_zero_point"].dtype == torch.int32
    assert not [name for name in state if name.endswith(("qweight", "g_idx"))]
    section = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    assert section["ignore"] == ["lm_head"]
    (group,) = section["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["symmetric"] == symmetric
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 32)


def test_layers_left_out_are_ignored_by_name(tmp_path):
    saved(tmp_path / "ours", skip=("*.down_proj",))
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    section = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    layers = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert section["ignore"] == [*layers, "lm_head"]
    assert measure_export(tmp_path / "ours", tmp_path / "theirs").relative <= 1e-3


def _mixed(ours, eight, target, name):
    """Write the folder `ours` with one layer of the folder `eight`."""
    source, other = open_quantized(ours), open_quantized(eight)
    with new_folder(ours, target) as written:
        writer = ShardWriter(written)
        for layer in source.layers:
            packed, _ = (other if layer == name else source).packed(layer)
            for part, tensor in packed.tensors().items():
                writer.add(f"{layer}.{part}", tensor)
        for plain in source.plain:
            writer.add(plain, source.files[plain])
        writer.finish()
        write_config(source.config, written)


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_of_other_bits_make_a_group_that_names_them(tmp_path, symmetric):
    saved(tmp_path / "four", symmetric=symmetric)
    saved(tmp_path / "eight", bits=8, symmetric=symmetric)
    _mixed(tmp_path / "four", tmp_path / "eight", tmp_path / "ours", NAME)
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    section = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    four, eight = section["config_groups"].values()
    assert (four["weights"]["num_bits"], len(four["targets"])) == (4, 13)
    assert (eight["weights"]["num_bits"], eight["targets"]) == (8, [NAME])
    assert measure_export(tmp_path / "ours", tmp_path / "theirs").relative <= 1e-3


def test_a_quantized_embedding_is_stored_in_full_precision(tmp_path):
    saved(tmp_path / "plain")
    source = open_quantized(tmp_path / "plain")
    embedding = weight(0, 8)  # (32, 64): half of the vocabulary
    whole = type(embedding)(
        embedding.integers.repeat(2, 1), embedding.scales.repeat(2, 1) / 100,
        embedding.zeros.repeat(2, 1), 8,
    )  # fmt: skip
    with new_folder(tmp_path / "plain", tmp_path / "ours") as written:
        writer = ShardWriter(written)
        for name in source.files:
            if name != "model.embed_tokens.weight":
                writer.add(name, source.files[name])
        for part, tensor in pack(whole).tensors().items():
            writer.add(f"model.embed_tokens.{part}", tensor)
        writer.finish()
        write_config(source.config, written)
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(state["model.embed_tokens.weight"], whole.dequantize())


def test_a_layer_that_is_no_linear_is_refused(tmp_path):
    saved(tmp_path / "ours", "gpt2")
    with pytest.raises(MismatchError, match=r"8 layers, first transformer\.h\.0"):
        export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_reordered_columns_are_refused(tmp_path):
    saved(tmp_path / "ours")
    source = open_quantized(tmp_path / "ours")
    with new_folder(tmp_path / "ours", tmp_path / "mixed") as written:
        writer = ShardWriter(written)
        for name in source.files:
            tensor = source.files[name]
            writer.add(name, tensor.flip(0) if name == f"{NAME}.g_idx" else tensor)
        writer.finish()
        write_config(source.config, written)
    with pytest.raises(MismatchError, match="desc_act"):
        export_compressed_tensors(tmp_path / "mixed", tmp_path / "theirs")


def test_the_librarys_model_of_the_section_accepts_it():
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {"a": Scheme(4, 64, True), "b": Scheme(8, -1, False), "c": Scheme(4, 64, True)}
    read = QuantizationConfig.model_validate(quantization_section(schemes, ["lm_head"]))
    first, second = read.config_groups.values()
    assert (first.targets, second.targets) == (["a", "c"], ["b"])
    assert (second.weights.strategy, second.weights.num_bits) == ("channel", 8)
