"""Code that a model brings along runs where someone trusts it, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.errors import SourceError
from stillroom.models import load_config, load_model
from stillroom.remote_code import code_is_trusted, copy_code, trusting_code
from stillroom.streamed import open_streamed
from tests.stillroom.own_code import write_own_model
from tests.stillroom.tiny import tiny_llama

IDS = torch.tensor([[1, 5, 7, 2]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # transformers keeps the code that it runs in a folder of the user's.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    write_own_model(tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize(
    "load",
    [load_config, load_model, lambda folder: open_streamed(folder, task="causal_lm")],
    ids=["config", "model", "streamed"],
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
