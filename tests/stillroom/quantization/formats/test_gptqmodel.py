"""Our GPTQ folder, read by somebody else: transformers with gptqmodel's kernels.

Runs after `make install-gptqmodel`, on two real layers of SmolLM2. The activations are fp32, so the
bound is the narrow one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.builtin import import_builtin
from stillroom.data.corpora import builtin_documents
from stillroom.data.tokens import tokenise_causal
from stillroom.distillation.student import initialise_student
from stillroom.models import load_model, load_tokenizer, tokenizer_hash
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_tokenizer
from tests.stillroom.tiny_mixtures import tiny_mixtral, tiny_qwen3_moe

READ = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = load_file(sys.argv[2])["ids"]
with torch.no_grad():
    logits = model(ids).logits.float().contiguous()
save_file({"logits": logits}, sys.argv[3])
kernels = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
print("KERNELS" + json.dumps(sorted(kernels)))
"""

MIXTURES = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file
ids, logits = load_file(sys.argv[1])["ids"], {}
for folder in sys.argv[3:]:
    options = {"device": "cpu", "dtype": torch.float16, "backend": BACKEND.TORCH}
    model = GPTQModel.load(folder, **options).model
    assert sum(hasattr(module, "qweight") for module in model.modules()) == 4 * (4 + 3 * 3)
    with torch.no_grad():
        logits[folder] = model(ids).logits.float().contiguous()
save_file(logits, sys.argv[2])
"""
needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="needs `make install-gptqmodel`"
)


def run(script: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@needs_gptqmodel
def test_gptqmodel_reads_our_mixtures_and_agrees(tmp_path: Path) -> None:
    """Its module tree has an expert's three layers by their names, of which ours are two in one."""
    from safetensors.torch import load_file, save_file

    models = {
        "mixtral": tiny_mixtral(hidden_size=64, intermediate_size=96),
        "qwen3-moe": tiny_qwen3_moe(hidden_size=64, moe_intermediate_size=32),
    }
    rows = token_rows()
    options = QuantizationOptions(bits=4, group_size=32, symmetric=True)
    for name, model in models.items():
        result = quantize_model(model, rows, options)
        save_quantized(model, tiny_tokenizer(), result, tmp_path / name)
    save_file({"ids": rows.input_ids}, tmp_path / "ids")
    run(MIXTURES, tmp_path / "ids", tmp_path / "logits", *(tmp_path / name for name in models))
    theirs = load_file(tmp_path / "logits")
    for name, model in models.items():
        with torch.no_grad():
            # In half precision as well: what is rounded may lead a token to another expert.
            ours = model.half()(rows.input_ids).logits.float()
        difference = float((ours - theirs[str(tmp_path / name)]).abs().max() / ours.abs().max())
        print(f"{name}, fp16: max |Δlogit| / max |logit| = {difference:.2e}")
        assert difference <= 1e-2


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("bits", [4, 3])
def test_transformers_reads_our_folder_and_agrees(bits: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    import_builtin("smollm2", folder)
    tokenizer = load_tokenizer(folder)
    model = initialise_student(load_model(folder), (0, 29))
    documents = builtin_documents("python-docs")[:8]
    prepared = tokenise_causal(
        documents, tokenizer, 128, pack=True, tokenizer_hash=tokenizer_hash(tokenizer)
    )
    rows = prepared.examples.take(slice(0, 8))
    options = QuantizationOptions(bits=bits, group_size=64)  # type: ignore[arg-type]
    result = quantize_model(model, rows, options)
    save_quantized(model, tokenizer, result, tmp_path / "model")
    save_file({"ids": rows.input_ids}, tmp_path / "ids.safetensors")
    paths = [tmp_path / "model", tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"]
    printed = run(READ, *paths)
    kernels = json.loads(printed.partition("KERNELS")[2])
    assert kernels, "nothing was loaded packed"
    theirs = load_file(paths[2])["logits"]
    with torch.no_grad():
        ours = load_quantized(tmp_path / "model")(rows.input_ids).logits
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{bits} bits, fp32, {kernels}: max |Δlogit| / max |logit| = {difference:.2e}")
    assert difference <= 1e-3
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) >= 0.99
