import pytest
import torch

from stillroom.distillation.teacher_cache import CacheOptions, capture
from stillroom.errors import SourceError
from stillroom.evaluation.quality import measure_quality
from stillroom.layout import Layout, input_device
from stillroom.models import load_model, save_model
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.quantization.test_sequential import rows
from tests.stillroom.rows import TOKENIZER, token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

# Without GPUs the disk stands for the devices that are not the first: its blocks come one by one.
OVER_DISK = {
    "model.embed_tokens": "disk",
    "lm_head": "disk",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
}


@pytest.fixture
def folder(tmp_path):
    save_model(tiny_llama(layers=3), tiny_tokenizer(), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("device_map", ["auto", OVER_DISK])
def test_a_teacher_that_is_laid_out_says_the_same(folder, tmp_path, device_map):
    laid_out = load_model(folder, laid_out=Layout(device_map, tmp_path / "offloaded"))
    if device_map != "auto":
        assert next(laid_out.model.layers[1].parameters()).is_meta, "it lies in memory"
    assert input_device(laid_out) == torch.device("cpu")
    examples, files = token_rows(6, padding=3), []
    for name, teacher in (("whole", load_model(folder)), ("laid out", laid_out)):
        options = CacheOptions(rows_per_shard=4, hidden_states="last")
        capture(teacher, examples, tmp_path / name, options, tokenizer_hash=TOKENIZER)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.safetensors")})
    assert files[0] == files[1]
    quality = measure_quality(laid_out, load_model(folder), examples)
    assert max(quality.kl_nats) < 1e-6


def test_a_quantized_model_is_not_laid_out(tmp_path):
    model = tiny_llama(hidden=64)
    result = quantize_model(model, rows(), QuantizationOptions(4, 32))
    save_quantized(model, tiny_tokenizer(), result, tmp_path)
    with pytest.raises(SourceError, match="is quantized"):
        load_model(tmp_path, laid_out=Layout("auto", tmp_path / "offloaded"))
