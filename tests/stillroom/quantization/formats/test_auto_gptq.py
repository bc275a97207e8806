"""Folders for auto-gptq 0.7.1, read by it in an environment of its own, and its folders read here.

What needs it runs after `make install-auto-gptq`. It insists on CUDA where it quantizes; two lines
of the script take its device and its wait for the device away, and it quantizes on a CPU.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.errors import CorruptedError, MismatchError
from stillroom.models import load_model
from stillroom.quantization.formats.auto_gptq import config_of_its_time, export_auto_gptq
from stillroom.quantization.formats.convert import measure_export
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tests.stillroom.quantization.formats.test_convert import saved
from tests.stillroom.quantization.test_sequential import logits, rows
from tests.stillroom.tiny import tiny_llama
from tests.stillroom.tiny_mixtures import tiny_mixtral

PYTHON = Path(__file__).parents[4] / ".bench" / "peers" / "auto-gptq" / "bin" / "python"
needs_auto_gptq = pytest.mark.skipif(not PYTHON.exists(), reason="needs `make install-auto-gptq`")

# One process for all folders: importing auto-gptq takes longer than the work.
SCRIPT = """
import json, sys, torch
import auto_gptq.modeling._base
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.modeling import LlamaGPTQForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
auto_gptq.modeling._base.CUDA_0 = torch.device("cpu")
torch.cuda.synchronize = lambda: None
root = sys.argv[1]
ids = load_file(f"{root}/ids")["ids"]
ours, settings = json.load(open(f"{root}/work.json"))
for name, values in settings.items():
    model = AutoModelForCausalLM.from_pretrained(f"{root}/dense", torch_dtype=torch.float32)
    model = LlamaGPTQForCausalLM(model, False, BaseQuantizeConfig(**values))
    rows = ids[:, None]
    model.quantize([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows])
    model.save_quantized(f"{root}/{name}", use_safetensors=True)
logits = {}
for name in [*ours, *settings]:
    model = AutoGPTQForCausalLM.from_quantized(
        f"{root}/{name}", device="cpu", torch_dtype=torch.float32
    ).model
    assert sum(hasattr(module, "qweight") for module in model.modules()) == 14, name
    with torch.no_grad():
        logits[name] = model(ids).logits.float().contiguous()
save_file(logits, f"{root}/logits")
"""

OURS = {
    "ours-4-bit": (4, 32, True),
    "ours-4-bit-asymmetric": (4, 32, False),
    "ours-3-bit": (3, 32, False),
    "ours-2-bit": (2, 32, True),
    "ours-8-bit": (8, -1, True),
}
THEIRS = {
    "theirs-4-bit": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "theirs-asymmetric": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "theirs-desc-act": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "theirs-3-bit": {"bits": 3, "group_size": 32, "sym": True, "desc_act": False},
    "theirs-8-bit": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with the models of both sides, and auto-gptq's logits of all of them."""
    root = tmp_path_factory.mktemp("auto-gptq")
    for name, (bits, group_size, symmetric) in OURS.items():
        saved(root / f"made-{name}", bits=bits, group_size=group_size, symmetric=symmetric)
        export_auto_gptq(root / f"made-{name}", root / name)
    tiny_llama(hidden=64).save_pretrained(root / "dense")
    save_file({"ids": rows(count=8, padded=False).input_ids}, root / "ids")
    (root / "work.json").write_text(json.dumps([list(OURS), THEIRS]))
    command = [str(PYTHON), "-W", "ignore", "-c", SCRIPT, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.slow
@needs_auto_gptq
@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_auto_gptq_and_we_read_the_same_folder_alike(root, name):
    theirs = load_file(root / "logits")[name]
    folder = root / (f"made-{name}" if name in OURS else name)
    for weights in ("packed", "dense"):
        model = load_model(folder, dtype=torch.float32, weights=weights)
        ours = logits(model, rows(count=8, padded=False))
        difference = float((theirs - ours).abs().max() / theirs.abs().max())
        print(f"{name}, {weights}: max |Δlogit| / max |logit| = {difference:.1e}")
        assert difference <= 1e-3


def test_the_export_says_what_auto_gptq_looks_for_and_still_loads_here(tmp_path):
    saved(tmp_path / "ours")
    export_auto_gptq(tmp_path / "ours", tmp_path / "export")
    settings = json.loads((tmp_path / "export" / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"]) == (4, 32)
    assert (settings["sym"], settings["desc_act"]) == (False, False)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert open_quantized(tmp_path / "export").checkpoint_format == "gptq"
    assert measure_export(tmp_path / "ours", tmp_path / "export").max_difference == 0


def test_a_layer_that_was_skipped_inside_the_blocks_is_refused(tmp_path):
    saved(tmp_path / "ours", skip=("*.mlp.down_proj",))
    with pytest.raises(MismatchError, match=r"2, first model\.layers\.0\.mlp\.down_proj, are not"):
        export_auto_gptq(tmp_path / "ours", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_fused_experts_are_refused(tmp_path):
    model = tiny_mixtral()
    result = quantize_model(model, rows(), QuantizationOptions(4, 16, method="rtn"))
    save_quantized(model, None, result, tmp_path / "ours")
    with pytest.raises(MismatchError, match=r"first model\.layers\.0\.mlp\.experts\.0\."):
        export_auto_gptq(tmp_path / "ours", tmp_path / "export")


@pytest.mark.parametrize("odd_size", [16, 64, -1])
def test_layers_of_several_group_sizes_are_refused(odd_size, tmp_path):
    model, options = tiny_llama(hidden=64), QuantizationOptions(4, 32, method="rtn")
    odd = {"model.layers.1.mlp.down_proj": replace(options, group_size=odd_size)}
    result = quantize_model(model, rows(), options, layer_options=odd)
    save_quantized(model, None, result, tmp_path / "ours")
    with pytest.raises(MismatchError, match=r"layers\.1\.mlp\.down_proj has . groups? in 128"):
        export_auto_gptq(tmp_path / "ours", tmp_path / "export")


def test_files_named_after_the_settings_are_found(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(load_model(tmp_path), rows()), logits(model, rows()))


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_biases_of_zeros_that_the_model_does_not_have_are_dropped(tmp_path, weights):
    model = saved(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.bias"
    state = load_file(path)
    save_file(state | {name: torch.zeros(128)}, path, metadata={"format": "pt"})
    loaded = load_model(tmp_path, weights=weights)
    assert (logits(loaded, rows()) - logits(model, rows())).abs().max() < 1e-5
    if weights == "dense":
        save_file(state | {name: torch.ones(128)}, path, metadata={"format": "pt"})
        with pytest.raises(CorruptedError, match=r"up_proj\.bias"):
            load_model(tmp_path)


def test_positions_that_its_transformers_does_not_know_are_refused():
    assert config_of_its_time({"dtype": "bfloat16"})["torch_dtype"] == "bfloat16"
    with pytest.raises(MismatchError, match="plain rotary positions"):
        config_of_its_time({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}})
