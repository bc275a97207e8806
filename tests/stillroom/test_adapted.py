"""Merging an adapter that lies beside its base on disk."""

import torch

from stillroom.adapted import merge_into
from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import save_adapter
from stillroom.adapters.options import LoraOptions
from stillroom.models import load_model, save_model
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer


def test_small_updates_of_a_base_in_half_precision_are_not_rounded_away(tmp_path):
    save_model(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    adapted = AdaptedModel(load_model(tmp_path / "base"))
    adapted.add("a", LoraOptions(rank=2))
    name = "model.layers.0.self_attn.q_proj"
    update = adapted.worn("a").method.updates[name.replace(".", "/")]
    with torch.no_grad():
        update.B.normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
    save_adapter(adapted, "a", tmp_path / "adapter", "base")

    merge_into(tmp_path / "base", tmp_path / "adapter", "causal_lm", tmp_path / "merged")

    merged = load_model(tmp_path / "merged")
    assert merged.dtype == torch.float32
    before = adapted.base.get_submodule(name).weight.float()
    moved = merged.get_submodule(name).weight - before
    expected = (update.scale * update.B @ update.A).detach()
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
