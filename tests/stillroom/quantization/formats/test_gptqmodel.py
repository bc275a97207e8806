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


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="needs `make install-gptqmodel`"
)
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
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.partition("KERNELS")[2])
    assert kernels, "nothing was loaded packed"
    theirs = load_file(paths[2])["logits"]
    with torch.no_grad():
        ours = load_quantized(tmp_path / "model")(rows.input_ids).logits
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{bits} bits, fp32, {kernels}: max |Δlogit| / max |logit| = {difference:.2e}")
    assert difference <= 1e-3
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) >= 0.99
