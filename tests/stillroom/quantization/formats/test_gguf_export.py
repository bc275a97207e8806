import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.errors import CorruptedError, MismatchError, SourceError
from stillroom.llama_engine import LlamaCppModel, has_llama_cpp
from stillroom.models import load_model, load_tokenizer
from stillroom.quantization.formats.gguf_check import compare_gguf
from stillroom.quantization.formats.gguf_export import export_gguf
from stillroom.quantization.packing import pack
from tests.stillroom.quantization.formats.gguf_models import (
    OWN,
    byte_tokenizer,
    rounded,
    tiny_model,
    write_checkpoint,
)
from tests.stillroom.tiny import tiny_bert_classifier, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="make install-llama-cpp was not run")
IDS = torch.arange(5, 45).unsqueeze(0)  # (1, 40)


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields_of(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "held"),
    [
        (2, 32, False, "2-bit as Q4_0"),
        (3, 64, False, "3-bit as Q4_0"),
        (4, -1, True, "4-bit as Q4_0"),
        (4, 32, False, "4-bit as Q4_1"),
        (8, 64, True, "8-bit as Q8_0"),
    ],
)
def test_the_file_holds_the_checkpoint(tmp_path, bits, group_size, symmetric, held):
    model = tiny_model("llama")
    write_checkpoint(model, tmp_path, bits, group_size, symmetric=symmetric)
    report = export_gguf(tmp_path, tmp_path / "model.gguf", embeddings="F32")
    assert report == compare_gguf(tmp_path, tmp_path / "model.gguf")
    assert report.layers == {held: 14}
    assert report.largest_embedding_error == 0
    exact = held != "4-bit as Q4_1"
    assert (report.largest_weight_error == 0) == exact == (report.inexact_layers == {})
    assert report.largest_error_steps < 0.01
    assert report.size_bytes == (tmp_path / "model.gguf").stat().st_size


def test_options_of_the_export(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path)
    file = tmp_path / "model.gguf"
    plain = export_gguf(tmp_path, file)
    assert plain.types == {"Q4_1": 14, "Q8_0": 2, "F32": 5}
    assert 0 < plain.largest_embedding_error < 0.01
    lossless = export_gguf(tmp_path, file, asymmetric="Q5_0", embeddings="F16")
    assert lossless.types == {"Q5_0": 14, "F16": 2, "F32": 5}
    assert lossless.largest_weight_error == 0
    export_gguf(tmp_path, file, exact_zeros=True)
    for tensor in tensors_of(file).values():
        if tensor.tensor_type.name == "Q4_1":
            pairs = tensor.data.reshape(-1, 20)[:, :4].copy().view(np.float16).astype(np.float64)
            zeros = -pairs[:, 1] / pairs[:, 0]
            assert np.array_equal(zeros, zeros.round())


def test_packed_embeddings_and_heads_stay_as_they_are(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head", "model.embed_tokens"):
        packed = pack(rounded(state.pop(f"{name}.weight"), 8, 32, symmetric=True))
        state |= {f"{name}.{part}": tensor for part, tensor in packed.tensors().items()}
    save_file(state, tmp_path / "model.safetensors")
    report = export_gguf(tmp_path, tmp_path / "model.gguf", embeddings="F32")
    assert report.layers == {"4-bit as Q4_1": 14, "8-bit as Q8_0": 2}
    assert not {"lm_head", "model.embed_tokens"} & report.inexact_layers.keys()


def test_rows_of_q_and_k_are_reordered_and_no_others(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path, symmetric=True)
    export_gguf(tmp_path, tmp_path / "model.gguf")
    stored = tensors_of(tmp_path / "model.gguf")
    model = load_model(tmp_path).model.layers[1].self_attn
    for name, heads in (("q", 4), ("k", 2), ("v", 0)):
        tensor = stored[f"blk.1.attn_{name}.weight"]
        came = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        rows = model.get_submodule(f"{name}_proj").weight.detach()
        if heads:  # of each head: row 0 of the first half, row 0 of the second, row 1 …
            pairs = rows.view(heads, 2, 8, 64)
            rows = torch.stack([pairs[:, half, i] for i in range(8) for half in range(2)], 1)
        assert torch.equal(came, rows.reshape(-1, 64))


def test_metadata(tmp_path):
    write_checkpoint(tiny_model("mistral", sliding_window=128), tmp_path)
    export_gguf(tmp_path, tmp_path / "model.gguf")
    fields = fields_of(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 128  # beyond the window it would be another model
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == 32
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert (types[1], types[9], types[tokens.index("<tool>")], types[-1]) == (3, 1, 4, 5)
    assert len(tokens) == 288


def test_what_gguf_has_no_words_for_is_refused(tmp_path):
    from stillroom.models import save_model

    write_checkpoint(tiny_model("llama", hidden_act="relu"), tmp_path / "relu")
    write_checkpoint(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), tmp_path / "scaled")
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    write_checkpoint(tiny_model("qwen2", rope_parameters=yarn), tmp_path / "yarn")
    write_checkpoint(tiny_model("llama"), tmp_path / "words", tokenizer=tiny_tokenizer())
    write_checkpoint(tiny_model("llama"), tmp_path / "narrow", group_size=16)
    write_checkpoint(
        tiny_bert_classifier(hidden=64, labels=8), tmp_path / "bert", tokenizer=tiny_tokenizer()
    )
    for name, message in {
        "relu": "relu came",
        "scaled": "scale_attn_by_inverse_layer_idx: False",
        "yarn": "yarn came",
        "words": "WordLevel came",
        "narrow": r"down_proj: expected groups of a multiple of 32",
        "bert": "bert came",
    }.items():
        with pytest.raises(MismatchError, match=message):
            export_gguf(tmp_path / name, tmp_path / name / "model.gguf")
        assert not list((tmp_path / name).glob("model.gguf*"))
    save_model(tiny_model("llama"), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(SourceError, match="expected a GPTQ checkpoint"):
        export_gguf(tmp_path / "dense", tmp_path / "model.gguf")


def test_a_tensor_without_a_place_is_named(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"model.extra.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError, match=r"model\.extra\.weight has no place"):
        export_gguf(tmp_path, tmp_path / "model.gguf")


def test_a_file_of_another_checkpoint_is_found_out(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path / "one", symmetric=True)
    write_checkpoint(tiny_model("llama", 1), tmp_path / "two", symmetric=True)
    write_checkpoint(tiny_model("llama", num_hidden_layers=1), tmp_path / "short", symmetric=True)
    export_gguf(tmp_path / "one", tmp_path / "model.gguf")
    report = compare_gguf(tmp_path / "two", tmp_path / "model.gguf")
    assert report.largest_weight_error > 0.01
    assert len(report.inexact_layers) == 14
    export_gguf(tmp_path / "short", tmp_path / "model.gguf")
    with pytest.raises(CorruptedError, match="lacks blk"):
        compare_gguf(tmp_path / "one", tmp_path / "model.gguf")
    write_checkpoint(tiny_model("llama", num_attention_heads=8), tmp_path / "heads")
    with pytest.raises(CorruptedError, match="shape"):
        compare_gguf(tmp_path / "heads", tmp_path / "model.gguf")


def test_the_folder_loads_as_before(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path)
    before = load_model(tmp_path)(input_ids=IDS).logits
    export_gguf(tmp_path, tmp_path / "model.gguf")
    assert torch.equal(load_model(tmp_path)(input_ids=IDS).logits, before)
    assert len(load_tokenizer(tmp_path)) == len(byte_tokenizer())


def test_transformers_reads_the_file(tmp_path):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tiny_model("llama"), tmp_path, symmetric=True)
    export_gguf(tmp_path, tmp_path / "model.gguf", embeddings="F32")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    expected = load_model(tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in OWN),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen3", {"rope_parameters": LINEAR}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("phi", {"tie_word_embeddings": True}),
    ],
)
@llama_cpp
def test_llama_cpp_gives_the_same_logits(tmp_path, kind, more):
    model = tiny_model(kind, **more)
    write_checkpoint(model, tmp_path)
    export_gguf(tmp_path, tmp_path / "model.gguf", embeddings="F32")
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits[0]
    came = torch.from_numpy(LlamaCppModel(tmp_path / "model.gguf", 1).logits(IDS[0].tolist()))
    # llama.cpp rounds a layer's inputs to 8 bits.
    assert (came - expected).abs().max() < 0.03 * expected.abs().max()
    divergence = expected.softmax(-1) * (expected.log_softmax(-1) - came.log_softmax(-1))
    assert divergence.sum(-1).mean() < 2e-4


@llama_cpp
def test_a_vocabulary_may_stay_out(tmp_path):
    model = tiny_model("llama")
    write_checkpoint(model, tmp_path, tokenizer=tiny_tokenizer())
    export_gguf(tmp_path, tmp_path / "model.gguf", vocabulary="none")
    came = LlamaCppModel(tmp_path / "model.gguf", 1).logits([5, 6, 7])
    assert came.shape == (3, 288)


def test_the_config_says_nothing_of_the_export(tmp_path):
    write_checkpoint(tiny_model("llama"), tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    export_gguf(tmp_path, tmp_path / "model.gguf")
    assert json.loads((tmp_path / "config.json").read_text()) == before
