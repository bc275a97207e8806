import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

import tasks.model_lock
import tasks.registered
from stillroom.adapters.folder import load_adapter
from stillroom.errors import MismatchError, ServiceUnreachableError, SourceError
from stillroom.models import load_model
from tasks.model_lock import model_lock
from tasks.registered import download_version, find_version, registered_keys
from tasks.registry import (
    Registered,
    champion,
    find_registered,
    move_alias,
    register_adapter,
    register_base,
    tag_gates,
)
from tests.registering import (
    TEXTS,
    Place,
    adapter_folder,
    classifier_folder,
    llama_folder,
    masked_folder,
    quantized_folder,
    register_pair,
)
from tests.stillroom.tiny import tiny_masked_tokenizer, tiny_tokenizer

# MLflow uses what SQLAlchemy will drop, and peft what transformers will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload``"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]

ASK = """
import json, sys
assert not any(name.startswith(("stillroom", "tasks", "tests")) for name in sys.modules)
import importlib.util
assert importlib.util.find_spec("tasks") is None
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
texts = json.loads(sys.argv[3])
params = {"max_new_tokens": 6} if model.metadata.get_params_schema() else None
answer = model.predict(pandas.DataFrame({"text": texts}), params=params)
assert answer.equals(model.predict(texts, params=params))
import stillroom
ours = sorted(name for name in sys.modules if name.startswith("stillroom"))
print(json.dumps([stillroom.__file__, ours, answer.to_dict("list")]))
"""


def files_of(version: Any) -> Path:
    return Path(version.source.removeprefix("file://"))


def ask_elsewhere(
    uri: str,
    reference: str,
    cwd: Path,
    access: dict[str, str] | None = None,
    texts: list[str] = TEXTS,
) -> tuple[list[str], dict[str, list[Any]]]:
    """Load and ask a registered version where this repository cannot be imported."""
    done = subprocess.run(
        # -I: no working directory, no PYTHONPATH.
        [sys.executable, "-I", "-c", ASK, uri, reference, json.dumps(texts)],
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1", "HOME": str(cwd), "HF_HUB_OFFLINE": "1", **(access or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, modules, answer = json.loads(done.stdout.splitlines()[-1])
    # An installed stillroom would be found too: the one the version carries must win.
    assert file.endswith("/code/stillroom/__init__.py")
    return modules, answer


def greedy(model: Any, text: str, count: int) -> str:
    """Return the continuation by the slow way: one argmax after the other, no cache."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    start = ids.shape[1]
    for _ in range(count):
        with torch.inference_mode():
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        if best.item() == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_registered_base_answers_where_the_repository_cannot_be_imported(place: Place) -> None:
    folder = llama_folder(place.root)
    made = register_base(place.client, place.candidate("tiny", folder, "a" * 64))
    move_alias(place.client, made, "champion", None)

    modules, answer = ask_elsewhere(place.uri, "models:/tiny@champion", place.root)

    model = load_model(folder)
    assert answer == {"generated": [greedy(model, text, 6) for text in TEXTS]}
    assert not [name for name in modules if "config" in name or "distillation" in name]


def test_registered_adapter_brings_its_base(place: Place) -> None:
    base, adapter = register_pair(place)
    stored = place.client.get_model_version(adapter.name, adapter.version)
    assert stored.tags["stillroom.base"] == base.uri
    assert stored.tags["stillroom.base_key"] == base.artifact_key

    _, answer = ask_elsewhere(place.uri, adapter.uri, place.root)

    model = load_adapter(load_model(llama_folder(place.root)), place.root / "adapter")
    plain = load_model(llama_folder(place.root))
    assert answer == {"generated": [greedy(model, text, 6) for text in TEXTS]}
    assert answer != {"generated": [greedy(plain, text, 6) for text in TEXTS]}


def test_registered_adapter_on_a_quantized_base(place: Place) -> None:
    folder = quantized_folder(place.root)
    _, adapter = register_pair(place, folder)

    _, answer = ask_elsewhere(place.uri, adapter.uri, place.root)

    model = load_adapter(load_model(folder, weights="packed"), place.root / "adapter")
    assert answer == {"generated": [greedy(model, text, 6) for text in TEXTS]}


def test_registered_classifier_labels(place: Place) -> None:
    folder = classifier_folder(place.root)
    candidate = place.candidate("sorts", folder, "c" * 64, task="sequence_classification")
    made = register_base(place.client, candidate)

    _, answer = ask_elsewhere(place.uri, made.uri, place.root)

    model = load_model(folder, task="sequence_classification")
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(answer["scores"][i]), expected)
        assert answer["label"][i] == model.config.id2label[int(expected.argmax())]


def test_registered_masked_model_fills_masks(place: Place) -> None:
    folder = masked_folder(place.root)
    candidate = place.candidate("fills", folder, "c" * 64, task="masked_lm")
    made = register_base(place.client, candidate)
    texts = ["ab[MASK]d", "[MASK]ello [MASK]here"]

    _, answer = ask_elsewhere(place.uri, made.uri, place.root, texts=texts)

    model, tokenizer = load_model(folder, task="masked_lm"), tiny_masked_tokenizer()
    for i, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            expected = model(input_ids=ids).logits[0].softmax(-1)[ids[0] == tokenizer.mask_token_id]
        scores, words = expected.max(-1)
        torch.testing.assert_close(torch.tensor(answer["scores"][i]), scores)
        assert answer["words"][i] == tokenizer.convert_ids_to_tokens(words.tolist())
    version = place.client.get_model_version("fills", made.version)
    example = json.loads((files_of(version) / "input_example.json").read_text())
    assert "[MASK]" in str(example), "the example must be one that the model answers"


def test_version_says_what_it_is(place: Place) -> None:
    folder = llama_folder(place.root)
    candidate = place.candidate(
        "tiny", folder, "a" * 64, metrics={"perplexity": 12.5}, tags={"recipe": "tiny"}
    )
    made = register_base(place.client, candidate)
    version = place.client.get_model_version("tiny", made.version)
    home = files_of(version)

    assert made == Registered("tiny", "1", "a" * 64, created=True)
    assert version.status == "READY"
    assert version.run_id == place.parent.run_id
    assert version.tags["stillroom.kind"] == "base"
    assert version.tags["recipe"] == "tiny"
    logged = place.client.get_logged_model(home.parent.name)
    assert {metric.key: metric.value for metric in logged.metrics} == {"perplexity": 12.5}
    names = {path.name for path in home.rglob("*") if path.is_file()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".pkl", ".bin", ".pt", ".pyc"))]
    needed = (home / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert not [line for line in needed if "+" in line or "==" not in line]


def test_same_artifact_is_registered_once(place: Place) -> None:
    candidate = place.candidate("tiny", llama_folder(place.root), "a" * 64)
    first = register_base(place.client, candidate)
    again = register_base(place.client, candidate)
    other = register_base(
        place.client, place.candidate("tiny", llama_folder(place.root, 1), "d" * 64)
    )
    assert (again.version, again.created) == (first.version, False)
    assert (other.version, other.created) == ("2", True)


def test_two_at_once_register_one_version(place: Place) -> None:
    candidate = place.candidate("tiny", llama_folder(place.root), "a" * 64)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: register_base(place.client, candidate), range(2)))
    assert {made.version for made in both} == {"1"}
    assert sorted(made.created for made in both) == [False, True]
    assert len(place.client.search_model_versions("name = 'tiny'")) == 1


def test_an_adapter_is_registered_anew_where_its_base_was_deleted(place: Place) -> None:
    base, adapter = register_pair(place)
    again = place.candidate("tiny-law", place.root / "adapter", "b" * 64)
    assert register_adapter(place.client, again, base) == replace(adapter, created=False)
    place.client.delete_model_version("tiny", base.version)

    base = register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    made = register_adapter(place.client, again, base)

    assert made == Registered("tiny-law", "2", "b" * 64, created=True)
    assert find_registered(place.client, "tiny-law", "b" * 64, base.uri) == replace(
        made, created=False
    )
    assert find_registered(place.client, "tiny-law", "b" * 64) is None
    stored = place.client.get_model_version("tiny-law", "2")
    assert stored.tags["stillroom.base"] == base.uri == "models:/tiny/2"


def test_empty_folder_is_refused_and_nothing_registered(place: Place) -> None:
    empty = place.root / "empty"
    empty.mkdir()
    with pytest.raises(SourceError, match="holds no files"):
        register_base(place.client, place.candidate("tiny", empty, "a" * 64))
    assert registered_keys(place.client) == set()


def test_failed_gates_are_written_down_and_move_nothing(place: Place) -> None:
    made = register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    tag_gates(place.client, made, ["perplexity", "size"])
    tags = place.client.get_model_version("tiny", "1").tags
    assert tags["stillroom.gates"] == "failed"
    assert tags["stillroom.gates_failed"] == "perplexity, size"
    assert champion(place.client, "tiny", "champion") is None


def test_gates_that_pass_later_replace_what_a_version_says(place: Place) -> None:
    made = register_base(place.client, place.candidate("tiny", llama_folder(place.root), "a" * 64))
    for failed in (["size"], [], []):
        tag_gates(place.client, made, failed)
        found = find_registered(place.client, "tiny", "a" * 64)
        assert found is not None
        made = found
    assert made.tags["stillroom.gates"] == "passed"
    assert "stillroom.gates_failed" not in made.tags


def test_alias_moves_from_the_champion_it_was_compared_with_only(place: Place) -> None:
    first, second, third = (
        register_base(place.client, place.candidate("tiny", llama_folder(place.root, i), key * 64))
        for i, key in enumerate("adf")
    )
    move_alias(place.client, first, "champion", None)
    now = champion(place.client, "tiny", "champion")
    assert now == Registered("tiny", "1", "a" * 64, created=False)

    move_alias(place.client, second, "champion", now)
    with pytest.raises(MismatchError, match=r"compared with version 1.*is version 2 by now"):
        move_alias(place.client, third, "champion", now)
    # What a rerun does.
    move_alias(place.client, second, "champion", now)

    after = champion(place.client, "tiny", "champion")
    assert after is not None
    assert after.version == "2"
    assert place.client.search_registered_models("name LIKE '%.lock'") == []


def test_nothing_is_champion_of_a_model_that_is_not_there(place: Place) -> None:
    assert champion(place.client, "nobody", "champion") is None


def test_lock_lets_one_in_at_a_time(place: Place) -> None:
    inside = 0
    most = 0
    count = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with model_lock(place.client, "tiny"):
            with count:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with count:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))
    assert most == 1


def test_lock_released_while_mlflow_looks_at_it_is_tried_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = place.client.create_registered_model
    answers = [MlflowException("not found", error_code=RESOURCE_DOES_NOT_EXIST)]

    def released_meanwhile(*arguments: Any, **named: Any) -> Any:
        if answers:
            raise answers.pop()
        return create(*arguments, **named)

    monkeypatch.setattr(place.client, "create_registered_model", released_meanwhile)
    with model_lock(place.client, "tiny"):
        assert place.client.get_registered_model("tiny.lock")
    assert not answers


def test_lock_that_is_held_too_long_is_named(place: Place) -> None:
    with (
        model_lock(place.client, "tiny"),
        pytest.raises(ServiceUnreachableError, match=r"tiny\.lock"),
        model_lock(place.client, "tiny", wait_seconds=0.1),
    ):
        pass


def test_lock_of_a_killed_process_is_taken_down(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.client.create_registered_model("tiny.lock", tags={"stillroom.lock_owner": "dead"})
    monkeypatch.setattr(tasks.model_lock, "EXPIRES_AFTER_SECONDS", 0.2)
    with model_lock(place.client, "tiny", wait_seconds=5):
        held = place.client.get_registered_model("tiny.lock")
        assert held.tags["stillroom.lock_owner"] != "dead"


def test_registered_keys_hold_what_gc_must_spare(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.registered, "VERSIONS_AT_ONCE", 1)
    base, adapter = register_pair(place)
    assert registered_keys(place.client) == {base.artifact_key, adapter.artifact_key}


def test_registered_keys_of_a_registry_that_fails_are_no_empty_set(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise MlflowException("API request failed with exception: refused")

    monkeypatch.setattr(place.client, "search_model_versions", fail)
    with pytest.raises(ServiceUnreachableError, match="nothing may be removed"):
        registered_keys(place.client)


def test_registered_version_as_a_source(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = register_pair(place)
    move_alias(place.client, base, "champion", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)

    found = find_version("models:/tiny@champion")
    folder = download_version("models:/tiny@champion", place.root / "fetched")

    assert found is not None
    assert found[:2] == ("tiny", "1")
    assert found == find_version("models:/tiny/1")
    assert find_version("models:/tiny/7") is None
    original = llama_folder(place.root) / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()
    with pytest.raises(SourceError, match="is an adapter"):
        download_version(adapter.uri, place.root / "other")


def test_adapter_files_are_the_adapter_alone(place: Place) -> None:
    _, adapter = register_pair(place)
    version = place.client.get_model_version(adapter.name, adapter.version)
    assert sorted(path.name for path in (files_of(version) / "artifacts" / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "stillroom_adapter.json",
    ]


def test_adapter_needs_a_registered_base(place: Place) -> None:
    candidate = place.candidate(
        "tiny-law", adapter_folder(place.root, llama_folder(place.root)), "b" * 64
    )
    nowhere = Registered("tiny", "9", "a" * 64, created=False)
    with pytest.raises((SourceError, MlflowException)):
        register_adapter(place.client, candidate, nowhere)
