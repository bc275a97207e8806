"""What the stage that imports a model takes from a folder, and what it refuses."""

import json
from pathlib import Path

import pytest

from stillroom.errors import SourceError
from stillroom.models import load_model
from tasks.sources import resolve_model
from tasks.stages import IMPORT_MODEL
from tasks.work import import_model
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer
from tests.tasks.benches import new_bench

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files."""
    folder = tmp_path / "sharded"
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def imported(folder: Path, place: Path) -> Path:
    place.mkdir()
    section = {"trust_remote_code": False, "dtype": "float32"}
    bench = new_bench(IMPORT_MODEL, section, place, {})
    bench.order.sources["source"] = resolve_model(str(folder), None)
    import_model.work(bench)
    return bench.output


def point(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_model_in_several_files_is_taken(sharded: Path, tmp_path: Path) -> None:
    output = imported(sharded, tmp_path / "bench")
    assert len(list(output.glob("*.safetensors"))) > 1
    load_model(output)


@pytest.mark.parametrize("name", ["/OTHER/model.safetensors", "../other/x.safetensors"])
@pytest.mark.parametrize("whole", [False, True])
def test_an_index_leads_to_no_other_folder(
    name: str, whole: bool, sharded: Path, tmp_path: Path
) -> None:
    point(sharded, name)
    if whole:
        tiny_llama().save_pretrained(sharded / "one")
        (sharded / "one" / "model.safetensors").rename(sharded / "model.safetensors")
    with pytest.raises(SourceError, match=rf"{INDEX} names '[/.]"):
        imported(sharded, tmp_path / "bench")


def test_an_index_of_missing_files_is_refused_unless_the_whole_is_there(
    sharded: Path, tmp_path: Path
) -> None:
    point(sharded, "model-00009.safetensors")
    with pytest.raises(SourceError, match=rf"{INDEX} names 'model-00009.safetensors'"):
        imported(sharded, tmp_path / "bench")
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    tiny_llama().save_pretrained(sharded)
    load_model(imported(sharded, tmp_path / "again"))


def test_an_index_of_another_variants_absent_files_is_left_alone(
    sharded: Path, tmp_path: Path
) -> None:
    (sharded / "model.fp16.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.fp16-00001.safetensors"}})
    )
    load_model(imported(sharded, tmp_path / "bench"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(SourceError, match=f"{INDEX} is no index of safetensors files"):
        imported(sharded, tmp_path / "bench")
