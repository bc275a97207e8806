import json
import logging
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch

from stillroom import serving_options
from stillroom.contents import BaseReference, Contents, list_files, verify_files
from stillroom.errors import MismatchError, RecipeError, SourceError
from stillroom.labels import require_label_head
from stillroom.llama_engine import GGUF_FILE, LlamaCppModel, has_llama_cpp, read_stop_ids
from stillroom.models import load_model, load_tokenizer
from stillroom.quantization.formats.gguf_export import export_gguf
from stillroom.serving import ServedModel
from stillroom.serving_options import DEFAULT_CONFIG, choose_engine
from tasks.registry import register_base
from tests.stillroom.quantization.formats.gguf_models import tiny_model, write_checkpoint

pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="make install-llama-cpp was not run")
TEXTS = ["the thing", "in 12 of", ""]
CONTENTS = Contents("base", "causal_lm", "a" * 64, "Apache-2.0", ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(tiny_model("llama", tie_word_embeddings=True), folder, 8, symmetric=True)
    export_gguf(folder, folder / GGUF_FILE)
    return folder


def chosen(folder, contents=CONTENTS, **config):
    return choose_engine({**DEFAULT_CONFIG, **config}, folder, contents)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(serving_options, "has_llama_cpp", lambda: True)


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(serving_options, "has_llama_cpp", lambda: False)


def test_llama_cpp_decodes_where_it_can(folder, installed):
    assert chosen(folder) == "llama.cpp"
    assert chosen(folder, engine="llama.cpp") == "llama.cpp"
    assert chosen(folder, engine="torch") == "torch"
    assert chosen(folder, device="cuda") == "torch"


@pytest.mark.parametrize(("name", "value"), [("weights", "dense"), ("dtype", "bfloat16")])
def test_what_only_torch_can_do_is_not_passed_over(folder, installed, caplog, name, value):
    with caplog.at_level(logging.WARNING):
        assert chosen(folder, **{name: value}) == "torch"
    assert f"{name} is {value}, and an export has its own" in caplog.text
    with pytest.raises(MismatchError, match=f"{name} is {value}"):
        chosen(folder, engine="llama.cpp", **{name: value})


def test_torch_decodes_by_rules_that_the_export_has_not(folder, tmp_path, installed, caplog):
    copied = shutil.copytree(folder, tmp_path / "copy")
    file = copied / "generation_config.json"
    plain = json.loads(file.read_text()) | {"repetition_penalty": 1.0, "min_length": None}
    file.write_text(json.dumps(plain))
    assert chosen(copied) == "llama.cpp"
    greedy = ServedModel(copied, CONTENTS, {"engine": "torch"}).predict(TEXTS, 16)
    file.write_text(json.dumps(plain | {"repetition_penalty": 1.8}))
    assert not ServedModel(copied, CONTENTS, {"engine": "torch"}).predict(TEXTS, 16).equals(greedy)
    assert chosen(copied) == "torch"
    assert "sets repetition_penalty, which only torch follows" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("weights", "Dense"), ("dtype", "int8")])
def test_options_that_there_are_not_are_refused(folder, name, value):
    with pytest.raises(RecipeError, match=f"expected {name} .*; {value} came"):
        ServedModel(folder, CONTENTS, {name: value, "engine": "torch"})


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_are_refused(folder, count):
    with pytest.raises(MismatchError, match=f"1 or more; {count} came"):
        ServedModel(folder, CONTENTS, {"engine": "torch"}).predict(TEXTS, count)


def test_torch_decodes_elsewhere(folder, tmp_path, absent, caplog):
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path) == "torch"
        assert not caplog.records
        assert chosen(folder) == "torch"
    assert "llama-cpp-python is not installed" in caplog.text
    answer = ServedModel(folder, CONTENTS, {}).predict(TEXTS, max_new_tokens=4)
    assert list(answer.columns) == ["generated"]
    assert len(answer) == 3


def test_an_engine_that_cannot_run_is_refused(folder, tmp_path, absent, installed):
    classifier = Contents("base", "sequence_classification", "a" * 64, "Apache-2.0", ())
    base = BaseReference("tiny", "1", "a" * 64, ())
    adapter = Contents("adapter", "causal_lm", "b" * 64, "Apache-2.0", (), base)
    for where, contents, message in (
        (tmp_path, CONTENTS, r"holds no model\.gguf.*quantization\.gguf: true"),
        (folder, classifier, "for sequence_classification"),
        (folder, adapter, "an adapter"),
    ):
        with pytest.raises(MismatchError, match=message):
            chosen(where, contents, engine="llama.cpp")
    with pytest.raises(RecipeError, match="vllm came"):
        chosen(folder, engine="vllm")


def test_an_engine_that_is_not_installed_is_refused(folder, absent):
    with pytest.raises(MismatchError, match="pip install llama-cpp-python"):
        chosen(folder, engine="llama.cpp")


def test_without_llama_cpp_the_engine_says_what_to_do(folder, monkeypatch):
    monkeypatch.setattr("stillroom.llama_engine.has_llama_cpp", lambda: False)
    with pytest.raises(SourceError, match="make install-llama-cpp"):
        LlamaCppModel(folder / GGUF_FILE)


def test_tokens_that_end_a_text(tmp_path):
    assert read_stop_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert read_stop_ids(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_stop_ids(tmp_path) == {2, 7}


def test_the_export_is_one_of_the_contents(folder, tmp_path):
    listed = list_files(folder)
    assert GGUF_FILE in {entry.path for entry in listed}
    copied = shutil.copytree(folder, tmp_path / "copy")
    verify_files(copied, listed, "tiny")
    assert load_model(copied).config.model_type == "llama"


@llama_cpp
def test_both_engines_answer_the_same(folder):
    answers = {}
    for engine in ("torch", "llama.cpp"):
        served = ServedModel(folder, CONTENTS, {"engine": engine})
        assert served.engine == engine
        answers[engine] = served.predict(TEXTS, max_new_tokens=8)
    assert answers["torch"].equals(answers["llama.cpp"])
    assert all(answers["torch"]["generated"])


class OneText:
    """Stands in for llama_cpp.Llama, which holds one text: the next token is its tokens' sum."""

    ctx = None

    def __init__(self, *_, n_ctx, **__):
        self.size, self.text = n_ctx, []

    def n_ctx(self):
        return self.size

    def n_vocab(self):
        return 97

    def reset(self):
        self.text = []

    def eval(self, ids):
        for i in ids:
            self.text.append(i)
            time.sleep(0)  # another thread's turn

    def close(self):
        pass


def test_texts_of_several_threads_do_not_mix(monkeypatch, tmp_path):
    """MLflow's server predicts in a thread for each question."""
    module = ModuleType("llama_cpp")
    module.Llama, module.__spec__ = OneText, ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    model = LlamaCppModel(tmp_path / GGUF_FILE, 1)
    monkeypatch.setattr(model, "_last_logits", lambda: np.eye(97)[sum(model._llama.text) % 97])
    prompts = [[1, 2, 3], [5] * 40, [7, 8], [9] * 11]
    alone = [model.continue_greedily(ids, 20, ()) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda ids: model.continue_greedily(ids, 20, ()), prompts * 5)
        assert list(together) == alone * 5


@llama_cpp
def test_a_text_ends_where_the_model_ends_it(folder):
    model = LlamaCppModel(folder / GGUF_FILE, 1)
    ids = load_tokenizer(folder)("the thing")["input_ids"]
    fresh = model.continue_greedily(ids, 8, ())
    assert model.continue_greedily(ids, 8, {fresh[3]}) == fresh[: fresh.index(fresh[3])]
    assert model.continue_greedily(ids, 0, ()) == []


@llama_cpp
def test_a_long_text_makes_room(folder):
    model = LlamaCppModel(folder / GGUF_FILE, 1)
    ids = torch.randint(4, 260, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    fresh = model.continue_greedily(ids, 3, ())
    assert len(fresh) == 3
    assert int(model.logits(ids)[-1].argmax()) == fresh[0]


ASK = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
for engine in ("auto", "torch", "llama.cpp"):
    model = mlflow.pyfunc.load_model(sys.argv[2], model_config={"engine": engine})
    answer = model.predict(json.loads(sys.argv[3]), params={"max_new_tokens": 6})
    print(json.dumps([model.unwrap_python_model().served.engine, answer.to_dict("list")]))
"""


@llama_cpp
@pytest.mark.filterwarnings("ignore:The ``noload``")
def test_a_registered_version_runs_its_export(folder, tmp_path, place):
    made = register_base(place.client, place.candidate("tiny", folder, "a" * 64))
    done = subprocess.run(
        # -I: the version's own code must do, without this repository.
        [sys.executable, "-I", "-c", ASK, place.uri, made.uri, json.dumps(TEXTS[:2])],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    engines, answers = zip(*map(json.loads, done.stdout.splitlines()[-3:]), strict=True)
    assert engines == ("llama.cpp", "torch", "llama.cpp")
    assert answers[0] == answers[1] == answers[2]


def test_a_bare_encoder_names_no_classes(tmp_path):
    for name, bare in (("BertModel", True), ("BertForSequenceClassification", False)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        if bare:
            with pytest.raises(SourceError, match="holds a BertModel, which has no head"):
                require_label_head(tmp_path, "this version", "load an adapter")
        else:
            require_label_head(tmp_path, "this version", "load an adapter")
