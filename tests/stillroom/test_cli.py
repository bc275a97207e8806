import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import stillroom.quantization.formats.convert as convert
from stillroom.cli import main
from stillroom.errors import SourceError, StoreError
from stillroom.quantization.formats.folder import open_quantized
from tests.stillroom.quantization.formats.test_convert import saved
from tests.stillroom.quantization.test_sequential import logits, rows
from tests.stillroom.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def _export(folder, target, export_format, *more):
    return main(["export", str(folder), str(target), "--format", export_format, *more])


@pytest.mark.parametrize("export_format", ["gptq", "gptq_v2", "auto-gptq", "compressed-tensors"])
def test_export_writes_and_compares(tmp_path, capsys, export_format):
    model = saved(tmp_path / "ours")
    assert _export(tmp_path / "ours", tmp_path / "new", export_format) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path / 'new'} written as {export_format}"
    assert out[1].startswith("loaded afresh, its logits differ by 0.0e+00 of the largest")
    if export_format == "compressed-tensors":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
        assert torch.equal(logits(loaded, rows()), logits(model, rows()))
    else:
        version = "gptq_v2" if export_format == "gptq_v2" else "gptq"
        assert open_quantized(tmp_path / "new").checkpoint_format == version


def test_no_check_loads_nothing(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "ours")
    monkeypatch.setattr(convert, "check_export", lambda *_: pytest.fail("compared"))
    assert _export(tmp_path / "ours", tmp_path / "new", "gptq_v2", "--no-check") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_cannot_be_exported_is_one_line_and_exit_code_2(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    saved(tmp_path / "three", bits=3)
    capsys.readouterr()
    for folder, export_format, text in (
        ("three", "gguf", "expected a BPE tokenizer"),
        ("dense", "gptq_v2", "expected a GPTQ checkpoint"),
        ("none", "gptq_v2", "holds no model"),
        ("three", "compressed-tensors", "holds 2, 4 and 8 bits"),
    ):
        assert _export(tmp_path / folder, tmp_path / "new", export_format) == 2
        error = capsys.readouterr().err
        assert error.startswith("stillroom: ")
        assert text in error
        assert error.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_an_export_that_computes_something_else_is_an_error(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "ours")
    write = convert.export_folder

    def spoil(folder, target, export_format):
        write(folder, target, export_format)
        state = load_file(target / "model.safetensors")
        state["model.layers.0.mlp.up_proj.qzeros"] += 0x11111111
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return target

    monkeypatch.setattr(convert, "export_folder", spoil)
    assert _export(tmp_path / "ours", tmp_path / "new", "gptq_v2") == 2
    assert "does not compute what" in capsys.readouterr().err


def test_what_could_not_be_compared_is_said(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "ours")

    def missing(*_, **__):
        raise SourceError("llama.cpp is not installed")

    monkeypatch.setattr(convert, "check_export", missing)
    assert _export(tmp_path / "ours", tmp_path / "new", "gptq_v2") == 0
    assert "its logits were not compared: llama.cpp is not" in capsys.readouterr().out


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        _export(tmp_path, tmp_path, "awq")
    assert stopped.value.code == 2


def test_a_gguf_is_a_file(tmp_path, monkeypatch):
    gguf_export = pytest.importorskip("stillroom.quantization.formats.gguf_export")
    monkeypatch.setattr(gguf_export, "export_gguf", lambda _, target: target.write_text("new"))
    for target, file in (("new", "new/model.gguf"), ("small.gguf", "small.gguf")):
        assert convert.export_folder(tmp_path, tmp_path / target, "gguf") == tmp_path / file
        assert (tmp_path / file).read_text() == "new"


def test_a_gguf_does_not_take_the_place_of_another_in_a_folder(tmp_path, monkeypatch):
    gguf_export = pytest.importorskip("stillroom.quantization.formats.gguf_export")
    monkeypatch.setattr(gguf_export, "export_gguf", lambda _, target: target.write_text("new"))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "model.gguf").write_text("old")
    with pytest.raises(StoreError, match=r"it holds model\.gguf"):
        convert.export_folder(tmp_path, tmp_path / "held", "gguf")
    assert (tmp_path / "held" / "model.gguf").read_text() == "old"


def test_a_defect_is_all_that_is_known_without_secrets(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise KeyError("postgresql://me:passphrase@db/x")

    monkeypatch.setattr("stillroom.pull.pull", fail)
    assert main(["pull", "models:/a/1", "folder"]) == 3
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "postgresql://***@db/x" in printed
