import json

import pytest
import torch

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.base_identity import identify, require_same_base
from stillroom.adapters.folder import load_adapter, load_into, save_adapter
from stillroom.adapters.options import LoraOptions
from stillroom.errors import MismatchError, SourceError
from tests.stillroom.adapters.quantized import quantize_blocks
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama


def saved(folder, base=None):
    adapted = AdaptedModel(tiny_llama() if base is None else base)
    adapted.add("a", LoraOptions(rank=2))
    save_adapter(adapted, "a", folder, "models:/base@champion")
    return folder


def test_another_base_shape_or_revision_is_refused_by_name(tmp_path):
    folder = saved(tmp_path)
    for base, line in {
        tiny_bert_classifier: "another base: it was trained on a llama, a bert came",
        lambda: tiny_llama(hidden=16): "another shape: .* hidden_size 32, 16 came",
        lambda: tiny_llama(layers=3): "another shape: .* layers 2, 3 came",
        lambda: tiny_llama(vocab=65): "another shape: .* vocabulary 64, 65 came",
        lambda: tiny_llama(seed=1): "another revision of its base",
    }.items():
        with pytest.raises(MismatchError, match=line):
            load_adapter(base(), folder)


def test_a_few_steps_of_training_make_another_revision(tmp_path):
    folder = saved(tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.05)
    with pytest.raises(MismatchError, match="revision"):
        load_adapter(other, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_is_the_same_base(dtype, tmp_path):
    load_adapter(tiny_llama().to(dtype), saved(tmp_path))


def test_a_quantized_base_and_its_dense_form_are_the_same_and_the_original_is_not(tmp_path):
    packed = quantize_blocks(tiny_llama())
    dense = quantize_blocks(tiny_llama())
    for name, module in list(dense.named_modules()):
        if hasattr(module, "to_linear"):
            parent, _, last = name.rpartition(".")
            setattr(dense.get_submodule(parent), last, module.to_linear())
    folder = saved(tmp_path, packed)
    load_adapter(dense, folder)


def test_a_base_that_computes_no_numbers_is_refused():
    identity = identify(tiny_llama())
    broken = identity.__class__(
        identity.architecture, identity.shape, "float32", (float("nan"),) * 64
    )
    with pytest.raises(MismatchError, match="revision"):
        require_same_base(identity, broken, "it")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(tiny_llama(), tmp_path)
    folder = saved(tmp_path)
    description = folder / "stillroom_adapter.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(MismatchError, match="format 2"):
        load_adapter(tiny_llama(), folder)
    description.write_text("{}")
    with pytest.raises(SourceError, match="does not describe"):
        load_adapter(tiny_llama(), folder)
    content["options"]["rank"] = 3
    description.write_text(json.dumps(content))
    adapted = AdaptedModel(tiny_llama())
    with pytest.raises(SourceError, match="do not fit"):
        load_into(adapted, "a", folder)
    assert not adapted.adapters  # nothing half loaded stays
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(SourceError, match="cannot be read"):
        load_adapter(tiny_llama(), folder)
