from dataclasses import replace

import pytest
import torch

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import DEFAULT, load_adapter, save_adapter
from stillroom.adapters.options import BottleneckOptions, LoraOptions
from stillroom.adapters.requantize import Merged, merge_requantized, require_little_added
from stillroom.adapters.training import train_adapter
from stillroom.errors import MismatchError, StageError
from stillroom.fine_tuning import measure
from stillroom.models import load_model
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.training.history import HELD_OUT_LOSS
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

OPTIONS = QuantizationOptions(bits=4, group_size=16)
TRAINING = TrainingOptions(steps=30, batch_rows=4, learning_rate=2e-2)


@pytest.fixture
def folders(tmp_path):
    """Return a 4-bit base and an adapter that it has learned something with."""
    model = tiny_llama()
    save_quantized(
        model, tiny_tokenizer(), quantize_model(model, token_rows(), OPTIONS), tmp_path / "base"
    )
    adapted = AdaptedModel(load_model(tmp_path / "base", weights="packed"))
    adapted.add("a", LoraOptions(rank=4))
    train_adapter(adapted, "a", token_rows(), TRAINING)
    save_adapter(adapted, "a", tmp_path / "adapter", "base")
    return tmp_path / "base", tmp_path / "adapter"


def merge(folders, options):
    adapted = load_adapter(load_model(folders[0]), folders[1])
    return merge_requantized(adapted, DEFAULT, token_rows(), token_rows(), options)


def loss_of(model):
    return measure(model, token_rows(), 4)[HELD_OUT_LOSS]


def test_merged_has_what_was_learned_in_weights_of_few_bits(folders):
    untaught = loss_of(load_model(folders[0]))
    merged = merge(folders, OPTIONS)
    assert merged.beside < untaught - 0.3
    assert abs(merged.added_nats) < 0.2 * (untaught - merged.beside)
    assert merged.inside == pytest.approx(loss_of(merged.model))
    assert len(merged.result.accounts) == 2 * 7
    up = merged.model.model.layers[0].mlp.up_proj.weight.detach()
    assert all(len(torch.unique(group)) <= 16 for group in up.reshape(-1, 16))


def test_rounding_to_nearest_adds_more(folders):
    rounded = merge(folders, replace(OPTIONS, bits=2, method="rtn"))
    solved = merge(folders, replace(OPTIONS, bits=2))
    assert solved.added_nats < rounded.added_nats


def test_what_adds_too_much_is_refused(folders):
    merged = merge(folders, replace(OPTIONS, bits=2))
    require_little_added(merged, merged.added_nats + 0.01, "law")
    with pytest.raises(StageError, match=r"adapter law: .*max_added_nats is 0\.001"):
        require_little_added(merged, 0.001, "law")
    with pytest.raises(StageError, match="nan"):
        require_little_added(Merged(None, merged.result, 1.0, float("nan")), 5.0, "law")


def test_only_a_low_rank_update_can_be_merged(folders, tmp_path):
    adapted = AdaptedModel(load_model(folders[0], weights="packed"))
    adapted.add("b", BottleneckOptions(width=2))
    save_adapter(adapted, "b", tmp_path / "other", "base")
    with pytest.raises(MismatchError, match="bottleneck came"):
        merge((folders[0], tmp_path / "other"), OPTIONS)
