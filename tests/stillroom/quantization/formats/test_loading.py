import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.errors import CorruptedError, MismatchError, SourceError
from stillroom.models import read_config
from stillroom.quantization.allocation import LayerChoice, layer_options
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.streamed import open_streamed
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama


@torch.no_grad()
@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_layers_may_differ_in_bits_and_groups(tmp_path, weights):
    model, data = tiny_llama(hidden=64), token_rows()
    options = QuantizationOptions(4, 32, damping=0.05)
    choices = {
        "model.layers.0.mlp.up_proj": LayerChoice(3, 64),
        "model.layers.1.mlp.down_proj": LayerChoice(8, -1),
        "model.layers.1.self_attn.q_proj": LayerChoice(2, 16),
    }
    result = quantize_model(model, data, options, layer_options=layer_options(choices, options))
    save_quantized(model, None, result, tmp_path)
    loaded = load_quantized(tmp_path, weights=weights)
    ids = data.input_ids
    assert torch.allclose(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    if weights == "packed":
        bits = {
            name: layer.bits
            for name, layer in loaded.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        expected = dict.fromkeys(result.layers, 4)
        assert bits == expected | {name: choice.bits for name, choice in choices.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of 4 bits."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_llama(hidden=64)
    result = quantize_model(model, token_rows(), QuantizationOptions(4, 32, damping=0.05))
    save_quantized(model, None, result, folder)
    return folder


def changed(whole: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write the checkpoint to `folder` with its tensors as `change` leaves them."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load_streamed(folder: Path) -> None:
    _, blocks = open_streamed(folder, task="causal_lm")
    blocks.load("model.layers.0")


LOADS = {
    "dense": load_quantized,
    "packed": lambda folder: load_quantized(folder, weights="packed"),
    "streamed": load_streamed,
}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("words", [torch.int16, torch.int64])
def test_words_of_another_width_are_refused(
    whole: Path, tmp_path: Path, load: Callable[[Path], object], words: torch.dtype
) -> None:
    """gptqmodel's pack_dtype: read as int32, the shapes say other bits and all of them fit."""

    def repack(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith(".qweight"):
                tensors[name] = tensors[name].T.contiguous().view(words).T.contiguous()
            if name.endswith(".qzeros"):
                tensors[name] = tensors[name].view(words)

    with pytest.raises(MismatchError, match="write it with pack_dtype int32"):
        load(changed(whole, tmp_path, repack))


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "short norm": (
        lambda own: own.update({"model.layers.0.input_layernorm.weight": torch.ones(1)}),
        r"model.layers.0.input_layernorm.weight",
    ),
    "one embedding": (
        lambda own: own.update({"model.embed_tokens.weight": torch.ones(64)}),
        "model.embed_tokens.weight",
    ),
    "group that is not there": (lambda own: own[f"{LAYER}.g_idx"].fill_(2), "groups 2 to 2"),
    "group from the end": (lambda own: own[f"{LAYER}.g_idx"].fill_(-1), "groups -1 to -1"),
    "fewer scales": (
        lambda own: own.update({f"{LAYER}.scales": own[f"{LAYER}.scales"][:1].clone()}),
        f"{LAYER}: expected the tensors of one layer",
    ),
    "another layer's": (
        lambda own: own.update(
            {
                name.replace("self_attn.k_proj", "mlp.up_proj"): tensor.clone()
                for name, tensor in own.items()
                if "layers.0.self_attn.k_proj" in name
            }
        ),
        rf"expects {LAYER} of shape \(128, 64\), \(32, 64\) came",
    ),
    "unknown layer": (
        lambda own: own.update(
            {
                name.replace("up_proj", "side_proj"): tensor.clone()
                for name, tensor in own.items()
                if LAYER in name
            }
        ),
        "no layer model.layers.0.mlp.side_proj",
    ),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_have_no_place_are_refused(
    whole: Path,
    tmp_path: Path,
    load: Callable[[Path], object],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    with pytest.raises(CorruptedError, match=message):
        load(changed(whole, tmp_path, change))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "does not say which file holds which tensor"),
        ("{}", "does not say which file holds which tensor"),
        ('{"weight_map": ["model.safetensors"]}', "does not say which file holds which tensor"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "expected files beside it"),
    ],
)
def test_an_index_that_says_nothing_or_names_files_elsewhere_is_refused(
    whole: Path, tmp_path: Path, index: str, message: str
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptedError, match=message):
        load_quantized(tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_whole_model_is_read_where_others_lie_beside_it(
    whole: Path, tmp_path: Path, load: Callable[[Path], object]
) -> None:
    """As transformers reads it: not an index of shards, and not an adapter."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    load(tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_weights_that_gptqmodel_rotated_are_refused(
    whole: Path, tmp_path: Path, load: Callable[[Path], object]
) -> None:
    """Its config alone says that what goes into down_proj is to be rotated as well."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    config = read_config(tmp_path)
    config["quantization_config"]["rotation"] = "hadamard"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"rotated \(hadamard\)"):
        load(tmp_path)
