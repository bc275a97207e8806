import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillroom.pull
from stillroom.adapters.folder import load_adapter
from stillroom.cli import main
from stillroom.contents import list_files, read_contents
from stillroom.errors import CorruptedError, MismatchError, SourceError, StoreError
from stillroom.models import load_model
from stillroom.pull import pull
from tasks.registry import move_alias, register_base
from tests.registering import (
    Place,
    adapted_logits,
    llama_folder,
    logits,
    quantized_folder,
    register_pair,
)

# MLflow uses what SQLAlchemy will drop, and peft what transformers will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload``"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]


@pytest.fixture
def goal(tmp_path: Path) -> Path:
    return tmp_path / "pulled" / "here"


def nothing_left(goal: Path) -> bool:
    return not goal.parent.exists() or not list(goal.parent.iterdir())


def registered_file(place: Place, name: str, version: str, file: str) -> Path:
    source = place.client.get_model_version(name, version).source
    return Path(source.removeprefix("file://")) / "artifacts" / "model" / file


def test_base_comes_as_a_plain_checkpoint(place: Place, goal: Path) -> None:
    folder = llama_folder(place.root)
    made = register_base(place.client, place.candidate("tiny", folder, "a" * 64))
    move_alias(place.client, made, "champion", None)

    pull("models:/tiny@champion", goal, tracking_uri=place.uri)

    assert list_files(goal) == list_files(folder)
    assert [path.name for path in goal.parent.iterdir()] == ["here"]
    model = AutoModelForCausalLM.from_pretrained(goal)
    torch.testing.assert_close(logits(model), logits(load_model(folder)), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(goal)("ab")["input_ids"]


def test_adapter_comes_with_its_base_and_moves_with_it(place: Place, goal: Path) -> None:
    _, adapter = register_pair(place)

    pull(adapter.uri, goal, tracking_uri=place.uri)

    moved = goal.rename(goal.with_name("elsewhere"))
    expected = adapted_logits(place.root)
    assert list_files(moved / "base") == list_files(llama_folder(place.root))
    config = json.loads((moved / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    by_transformers = AutoModelForCausalLM.from_pretrained(moved / "adapter")
    base = AutoModelForCausalLM.from_pretrained(moved / "base")
    by_peft = PeftModel.from_pretrained(base, str(moved / "adapter"))
    by_us = load_adapter(load_model(moved / "base"), moved / "adapter")
    for model in (by_transformers, by_peft, by_us):
        torch.testing.assert_close(logits(model), expected)
    assert (logits(load_model(moved / "base")) - expected).abs().max() > 0.01


def test_merged_is_one_model_that_says_what_the_adapter_says(place: Place, goal: Path) -> None:
    _, adapter = register_pair(place)

    pull(adapter.uri, goal, merged=True, tracking_uri=place.uri)

    assert not [path for path in goal.rglob("*") if "adapter" in path.name]
    merged = AutoModelForCausalLM.from_pretrained(goal)
    torch.testing.assert_close(logits(merged), adapted_logits(place.root), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(goal)("ab")["input_ids"]


def test_adapter_on_a_quantized_base_merges_into_a_dense_model(place: Place, goal: Path) -> None:
    base = quantized_folder(place.root)
    _, adapter = register_pair(place, base)

    pull(adapter.uri, goal, merged=True, tracking_uri=place.uri)

    assert "quantization_config" not in json.loads((goal / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(goal)
    expected = adapted_logits(place.root, base)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("which", "file"), [("tiny", "model.safetensors"), ("tiny-law", "adapter_model.safetensors")]
)
def test_a_flipped_bit_is_found_and_nothing_left(
    place: Place, goal: Path, which: str, file: str
) -> None:
    _, adapter = register_pair(place)
    path = registered_file(place, which, "1", file)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)

    with pytest.raises(CorruptedError, match=f"models:/{which}/1: {file} is not the file"):
        pull(adapter.uri, goal, tracking_uri=place.uri)

    assert nothing_left(goal)


@pytest.mark.parametrize("what", ["missing", "added"])
def test_a_file_too_few_or_too_many_is_found(place: Place, goal: Path, what: str) -> None:
    register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    file = registered_file(place, "tiny", "1", "model.safetensors")
    if what == "missing":
        file.unlink()
    else:
        file.with_name("modeling_evil.py").write_text("")
    with pytest.raises(CorruptedError, match=r"is missing|was never registered"):
        pull("models:/tiny/1", goal, tracking_uri=place.uri)
    assert nothing_left(goal)


def test_listing_that_leads_out_of_the_folder_is_refused(place: Place) -> None:
    register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    listing = registered_file(place, "tiny", "1", "x").parents[1] / "stillroom.json"
    raw = json.loads(listing.read_text())
    raw["files"][0]["path"] = "../../outside"
    listing.write_text(json.dumps(raw))
    with pytest.raises(CorruptedError, match="does not list"):
        read_contents(listing)


def test_another_base_under_the_same_version_is_refused(
    place: Place, goal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = register_pair(place)
    other = register_base(
        place.client, place.candidate("other", llama_folder(place.root, 1), "d" * 64)
    )
    real = place.client.get_model_version_download_uri

    def redirected(name: str, version: str) -> Any:
        return real(other.name if name == "tiny" else name, version)

    monkeypatch.setattr(place.client, "get_model_version_download_uri", redirected)
    monkeypatch.setattr(stillroom.pull, "open_client", lambda _: place.client)
    with pytest.raises(MismatchError, match="is not the base this adapter was trained on"):
        pull(adapter.uri, goal)
    assert nothing_left(goal)


def test_full_folder_is_refused_and_kept(place: Place, tmp_path: Path) -> None:
    register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="empty or a new folder"):
        pull("models:/tiny/1", mine, tracking_uri=place.uri)
    assert (mine / "letter.txt").read_text() == "dear"


def test_empty_folder_is_taken_and_one_beside_it_left_alone(place: Place, goal: Path) -> None:
    register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    goal.mkdir(parents=True)
    mine = goal.with_name("here.part")
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    pull("models:/tiny/1", goal, tracking_uri=place.uri)
    assert (goal / "config.json").is_file()
    assert (mine / "letter.txt").read_text() == "dear"
    assert sorted(path.name for path in goal.parent.iterdir()) == ["here", "here.part"]


def test_adapter_comes_into_a_mount_that_a_link_names(
    place: Place, mounted: Path, goal: Path
) -> None:
    _, adapter = register_pair(place)
    goal.parent.mkdir()
    goal.symlink_to(mounted)

    pull(adapter.uri, goal, tracking_uri=place.uri)

    assert sorted(path.name for path in mounted.iterdir()) == ["adapter", "base"]
    assert goal.is_symlink()
    found = logits(AutoModelForCausalLM.from_pretrained(goal / "adapter"))
    torch.testing.assert_close(found, adapted_logits(place.root))


def test_a_failed_pull_leaves_a_mount_empty(place: Place, mounted: Path) -> None:
    _, adapter = register_pair(place)
    registered_file(place, "tiny", "1", "model.safetensors").unlink()
    with pytest.raises(CorruptedError, match="is missing"):
        pull(adapter.uri, mounted, tracking_uri=place.uri)
    assert list(mounted.iterdir()) == []


@pytest.mark.parametrize(
    "reference", ["tiny", "models:/tiny", "models:/tiny/latest", "models:/a/b/c", "s3://b/x"]
)
def test_what_is_no_reference_is_refused_before_anything_is_asked(
    reference: str, goal: Path
) -> None:
    with pytest.raises(SourceError, match="expected models:/NAME@ALIAS"):
        pull(reference, goal, tracking_uri="http://127.0.0.1:9")


def test_command_says_in_one_line_what_is_wrong(
    place: Place, goal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["pull", "models:/nobody@champion", str(goal), "--tracking", place.uri])
    output = capsys.readouterr()
    assert code == 2
    assert output.err.startswith("stillroom: models:/nobody@champion: MLflow has no such")
    assert len(output.err.splitlines()) == 1
    assert nothing_left(goal)


def test_command_names_a_server_that_does_not_answer(
    goal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillroom.pull.open_client, "__kwdefaults__", {"wait_seconds": 0.3})
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    code = main(["pull", "models:/tiny/1", str(goal), "--tracking", uri])
    output = capsys.readouterr()
    assert code == 2
    assert f"MLflow at {uri} did not answer" in output.err
    assert len(output.err.splitlines()) == 1


def test_command_pulls(place: Place, goal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter = register_pair(place)
    assert main(["pull", adapter.uri, str(goal), "--tracking", place.uri]) == 0
    assert f"from_pretrained('{goal / 'adapter'}')" in capsys.readouterr().out


def test_help_needs_no_torch_and_no_mlflow() -> None:
    code = (
        "import sys\nfrom stillroom.cli import main\n"
        "try: main(['pull', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--merged" in done.stdout
    assert time.monotonic() - start < 5
