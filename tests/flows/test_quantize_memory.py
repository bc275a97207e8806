"""A quantization stays within the memory that --plan states, however many blocks there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.estimate import estimate
from flows.shape import model_shape
from stillroom.config import validate
from stillroom.models import save_model
from tasks.stages import QUANTIZE_MODEL, Order, as_json
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

PEAK = """
import json, sys, torch
from pathlib import Path
from types import SimpleNamespace
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.streamed import open_streamed
folder, target = Path(sys.argv[1]), Path(sys.argv[2])
model, blocks = open_streamed(folder, task="causal_lm")
ids = torch.randint(4, 64, (16, 128), generator=torch.Generator().manual_seed(0))
rows = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
result = quantize_model(model, rows, QuantizationOptions(4, 64), blocks=blocks)
save_quantized(model, None, result, target, blocks=blocks, shard_bytes=1 << 22)
# Not ru_maxrss: that counts what the process was forked from, too.
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"peak": peak}))
"""


def _peak(tmp_path: Path, layers: int) -> dict[str, float]:
    folder = tmp_path / f"model-{layers}"
    if not folder.exists():
        save_model(tiny_llama(layers=layers, hidden=512), tiny_tokenizer(), folder)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PEAK,
        str(folder),
        str(tmp_path / f"q{layers}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_blocks_and_stays_within_the_plan(tmp_path: Path) -> None:
    # A peak is the largest of what every block needed, which varies by some 50 MB: so the model
    # is large against that (it and its 36 more blocks are 450 and 340 MB).
    few, many = _peak(tmp_path, 12), _peak(tmp_path, 48)
    whole = (tmp_path / "model-48" / "model.safetensors").stat().st_size
    assert many["peak"] - few["peak"] < 0.15 * whole
    recipe = validate(
        {
            "name": "memory",
            "teacher": {"source": str(tmp_path / "model-48")},
            "data": {"train": {"source": "x"}, "sequence_length": 128, "calibration_rows": 16},
            "quantization": {"bits": 4},
        },
        "here",
    )
    assert recipe.quantization is not None
    order = Order(
        title="quantize", stage=QUANTIZE_MODEL, section=as_json(recipe.quantization), seed=0
    )
    planned = estimate(order, recipe, model_shape(tmp_path / "model-48"))
    assert many["peak"] < planned.memory_bytes
