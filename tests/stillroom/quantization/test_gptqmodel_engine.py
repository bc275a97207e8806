"""The engine gptqmodel, and GPTQ folders that gptqmodel wrote.

What needs the package runs after `make install-gptqmodel` (or with its folder on PYTHONPATH), in a
process of its own: importing it changes torch and transformers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.errors import RecipeError
from stillroom.models import load_model, save_model
from stillroom.quantization import gptqmodel_engine as engine
from stillroom.quantization.formats.convert import export_folder, measure_export
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.losses import Loss
from stillroom.quantization.options import QuantizationOptions
from tests.stillroom.quantization.formats.test_convert import weight
from tests.stillroom.quantization.test_sequential import logits, rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer
from tests.stillroom.tiny_mixtures import tiny_mixtral, tiny_qwen3_moe

INSTALLED = importlib.util.find_spec("gptqmodel") is not None
needs_gptqmodel = pytest.mark.skipif(not INSTALLED, reason="needs `make install-gptqmodel`")
NAME = "model.layers.0.mlp.up_proj"

QUANTIZE = """
import dataclasses, json, sys
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import load_file
from stillroom.quantization.gptqmodel_engine import quantize_with_gptqmodel
from stillroom.quantization.options import QuantizationOptions
source, target, ids, options, skip = sys.argv[1:]
accounts = quantize_with_gptqmodel(
    Path(source), SimpleNamespace(**load_file(ids)), QuantizationOptions(**json.loads(options)),
    Path(target), skip=tuple(json.loads(skip)),
)
print("ACCOUNTS" + json.dumps([dataclasses.asdict(account) for account in accounts]))
"""

# gptqmodel alone: quantizes, saves, reads its own checkpoint back, in float32 through transformers;
# layers of different bits only it reads itself, in bfloat16, and mixtures, in float16.
WRITE = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoModelForCausalLM
source, target, ids, settings = sys.argv[1:]
ids = load_file(ids)["input_ids"]
model = GPTQModel.load(source, QuantizeConfig(**json.loads(settings)))
samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
model.quantize(samples, batch_size=1, calibration_data_min_length=1)
model.save(target)
if "dynamic" in settings:
    read = GPTQModel.load(target, dtype=torch.bfloat16).model
elif model.model.config.model_type in ("mixtral", "qwen3_moe"):
    read = GPTQModel.load(target, dtype=torch.float16).model
else:
    read = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": read(ids).logits.float().contiguous()}, target + "/../logits.safetensors")
"""


def _model(folder):
    model = tiny_llama(hidden=64)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def _run(script, *arguments):
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=280, env=environment, check=False,
        cwd=Path(arguments[0]).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _calibration(folder):
    data = rows(count=8, padded=False)
    save_file({"input_ids": data.input_ids, "attention_mask": data.attention_mask}, folder)
    return data


@pytest.fixture(autouse=True)
def library_on_the_path(monkeypatch):
    root = Path(__file__).parents[3]
    known = [str(root / "compression"), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, known)))


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 3, "group_size": 32, "symmetric": False},
        {"bits": 8, "group_size": -1, "symmetric": False, "damping": 0.02},
        {"bits": 4, "group_size": 16, "symmetric": False, "act_order": False},
    ],
)
def test_the_engine_leaves_our_folder_and_our_accounts(tmp_path, options):
    original = _model(tmp_path / "model")
    data = _calibration(tmp_path / "rows.safetensors")
    out = _run(
        QUANTIZE, tmp_path / "model", tmp_path / "quantized", tmp_path / "rows.safetensors",
        json.dumps(options), "[]",
    )  # fmt: skip
    accounts = json.loads(out.partition("ACCOUNTS")[2])
    assert [account["name"] for account in accounts] == list(
        open_quantized(tmp_path / "quantized").layers
    )
    assert len(accounts) == 14
    worst = {8: 1e-4, 4: 0.05, 3: 0.2}[options["bits"]]
    for account in accounts:
        assert (account["method"], account["fell_back"]) == ("gptq", False)
        assert 0 < account["relative_error"] < worst
        assert account["damping"] == pytest.approx(options.get("damping", 0.05), abs=0.02)
    loaded = load_model(tmp_path / "quantized")
    assert loaded.dtype == torch.float32
    difference = (logits(loaded, data) - logits(original, data)).abs().max()
    assert difference <= 0.6 * logits(original, data).abs().max()
    assert (tmp_path / "quantized" / "tokenizer.json").exists()
    export_folder(tmp_path / "quantized", tmp_path / "two", "gptq_v2")
    assert measure_export(tmp_path / "quantized", tmp_path / "two").max_difference == 0


@pytest.mark.slow
@needs_gptqmodel
def test_layers_that_are_skipped_keep_their_weights(tmp_path):
    original = _model(tmp_path / "model")
    _calibration(tmp_path / "rows.safetensors")
    out = _run(
        QUANTIZE, tmp_path / "model", tmp_path / "quantized", tmp_path / "rows.safetensors",
        json.dumps({"group_size": 32}), json.dumps(["*.down_proj"]),
    )  # fmt: skip
    assert len(json.loads(out.partition("ACCOUNTS")[2])) == 12
    state = load_file(tmp_path / "quantized" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(state[name], original.state_dict()[name])


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 32, "sym": True},
        {"bits": 4, "group_size": 32, "sym": False},
        {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
        {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
        {"bits": 3, "group_size": 32, "sym": True},
        {"bits": 4, "group_size": 32, "dynamic": {".*down_proj.*": {"bits": 8}}},
    ],
    ids=["v1", "asymmetric", "v2", "desc_act", "3-bit", "mixed"],
)
def test_we_read_what_gptqmodel_writes(tmp_path, settings):
    _model(tmp_path / "model")
    data = _calibration(tmp_path / "rows.safetensors")
    target = tmp_path / "theirs"
    _run(WRITE, tmp_path / "model", target, tmp_path / "rows.safetensors", json.dumps(settings))
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    for weights in ("packed", "dense"):
        ours = logits(load_model(target, dtype=torch.float32, weights=weights), data)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        print(f"{settings}, {weights}: max |Δlogit| / max |logit| = {difference:.1e}")
        assert difference <= (0.05 if "dynamic" in settings else 2e-3)


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe])
def test_we_read_the_mixtures_that_gptqmodel_writes(tmp_path, make):
    model = make(hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    data = _calibration(tmp_path / "rows.safetensors")
    target, settings = tmp_path / "theirs", {"bits": 4, "group_size": 32, "sym": True}
    _run(WRITE, tmp_path / "model", target, tmp_path / "rows.safetensors", json.dumps(settings))
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    for weights in ("packed", "dense"):
        ours = logits(load_model(target, dtype=torch.float16, weights=weights), data).float()
        by_token = ((ours - theirs).abs().amax(-1) / theirs.abs().max()).flatten()
        print(f"{make.__name__}, {weights}: {by_token.median():.1e}, {by_token.max():.1e}")
        # What is rounded leads a token or two to another expert.
        assert by_token.quantile(0.95) <= 5e-3


@pytest.mark.skipif(INSTALLED, reason="gptqmodel is installed")
def test_without_the_package_one_line_says_what_to_do(tmp_path):
    with pytest.raises(RecipeError, match="make install-gptqmodel"):
        engine.quantize_with_gptqmodel(tmp_path, rows(), QuantizationOptions(), tmp_path / "out")


def test_another_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    with pytest.raises(RecipeError, match="does gptq, got method rtn"):
        engine.quantize_with_gptqmodel(
            tmp_path, rows(), QuantizationOptions(method="rtn"), tmp_path / "out"
        )


def test_a_skip_that_fits_no_layer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(RecipeError, match=r"skip must fit some .*\*\.down_porj"):
        engine.quantize_with_gptqmodel(
            tmp_path / "model", rows(), QuantizationOptions(), tmp_path / "out",
            skip=("*.down_porj",),
        )  # fmt: skip


def test_our_options_by_their_names():
    options = QuantizationOptions(bits=3, group_size=64, symmetric=True, damping=0.02)
    section = engine.engine_config(options, ())
    assert (section["bits"], section["group_size"], section["sym"]) == (3, 64, True)
    assert (section["act_group_aware"], section["desc_act"]) == (True, False)
    assert section["damp_percent"] == 0.02
    whole = engine.engine_config(QuantizationOptions(group_size=-1), ("*.down_proj",))
    assert (whole["act_group_aware"], whole["desc_act"]) == (False, True)
    (pattern,) = whole["dynamic"]
    assert pattern.startswith("-:")


@pytest.mark.parametrize(
    ("log", "fell_back"),
    [
        ([{"layer": 0, "module": "mlp.up_proj", "loss": "0.001", "damp": "0.05"}], False),
        ([{"layer": 0, "module": "mlp.up_proj", "loss": "rtn fallback", "damp": "0.05"}], True),
        ([{"layer": 0, "module": "mlp.up_proj", "loss": "fallback(rtn): 1", "damp": "0"}], True),
        ([{"layer": 1, "module": "mlp.up_proj", "loss": "0.001", "damp": "0.05"}], True),
        ([], True),
    ],
)
def test_a_layer_that_the_log_does_not_vouch_for_fell_back(log, fell_back):
    loss = Loss(weight(0, 4), torch.ones(32, 64), energy=4.0, lost=1.0)
    account = engine.account_for(NAME, loss, log)
    assert account.fell_back == fell_back
    assert account.method == ("rtn" if fell_back else "gptq")
    assert account.damping == (0 if fell_back else 0.05)
    assert (account.relative_error, account.weights) == (0.25, 2048)
