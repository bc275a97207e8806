"""Code that a model brings along runs where someone trusts it, and nowhere else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.errors import MismatchError, SourceError
from stillroom.models import load_config, load_model, load_tokenizer
from stillroom.quantization.formats.convert import export_folder
from stillroom.quantization.formats.gguf_export import require_gguf
from stillroom.remote_code import code_is_trusted, copy_code, trusting_code
from stillroom.streamed import open_streamed
from tests.stillroom.own_code import write_own_model
from tests.stillroom.tiny import tiny_llama

IDS = torch.tensor([[1, 5, 7, 2]])


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for the code that runs: transformers keeps it among the user's files."""
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture(params=["own", "llama"])
def folder(tmp_path: Path, modules: None, request: pytest.FixtureRequest) -> Path:
    """A model with code of its own, of a kind that transformers knows too or does not know."""
    write_own_model(tmp_path / request.param, request.param)
    return tmp_path / str(request.param)


@pytest.mark.parametrize(
    "load",
    [
        load_config,
        load_model,
        load_tokenizer,
        lambda folder: open_streamed(folder, task="causal_lm"),
    ],
    ids=["config", "model", "tokenizer", "streamed"],
)
def test_untrusted_code_does_not_run(folder: Path, load: Any) -> None:
    mark = folder.parent / "ran"
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n{file.read_text()}")
    with pytest.raises(SourceError, match="only where someone trusts it"):
        load(folder)
    assert not mark.exists()


def test_trusted_code_computes(folder: Path) -> None:
    with trusting_code():
        model = load_model(folder)
    with torch.no_grad():
        own, usual = model(IDS).logits, tiny_llama(seed=1, layers=4, hidden=64)(IDS).logits
    torch.testing.assert_close(own, usual / 2)


def test_without_its_files_transformers_own_class_loads_it(folder: Path) -> None:
    for file in folder.glob("*.py"):
        file.unlink()
    if folder.name == "llama":
        assert type(load_model(folder)).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(SourceError, match="only where someone trusts it"):
            load_model(folder)


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/else--configuration_own.OwnConfig"
    (folder / "config.json").write_text(json.dumps(config))
    with trusting_code(), pytest.raises(SourceError, match="another repository, someone/else--"):
        load_model(folder)


def test_code_that_lacks_a_package_says_so(tmp_path: Path, modules: None) -> None:
    # transformers keeps to the code that it saw first of a kind.
    folder = tmp_path / "lacking"
    write_own_model(folder, "lacking")
    file = folder / "configuration_own.py"
    file.write_text("import no_such_package\n" + file.read_text())
    with trusting_code(), pytest.raises(SourceError, match="no_such_package"):
        load_model(folder)


def test_formats_whose_readers_do_not_run_it_are_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with trusting_code(), pytest.raises(MismatchError, match=r"llama\.cpp does not run"):
        require_gguf(folder, 32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    for written in ("compressed-tensors", "auto-gptq", "gguf"):
        with trusting_code(), pytest.raises(MismatchError, match="does not run"):
            export_folder(folder, tmp_path / written, written)  # type: ignore[arg-type]


def test_trust_ends(folder: Path) -> None:
    with trusting_code():
        with trusting_code(False):
            assert not code_is_trusted()
        assert code_is_trusted()
    assert not code_is_trusted()


def test_code_goes_along_and_replaces_nothing(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "modeling_own.py").write_text("mine")
    copy_code(folder, made)
    assert sorted(file.name for file in made.iterdir()) == [
        "configuration_own.py",
        "modeling_own.py",
    ]
    assert (made / "modeling_own.py").read_text() == "mine"
