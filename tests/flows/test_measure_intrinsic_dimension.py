"""A search for the intrinsic dimension: by the command line, the flow and the library alike."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from flows.dimension_road import plan_search, print_search
from stillroom.config import dump_recipe, load_dimension_recipe
from stillroom.data.prepare import load_prepared
from stillroom.errors import RecipeError
from stillroom.intrinsic_dimension.artifact import load_base, load_with_base
from stillroom.intrinsic_dimension.measure import measure_intrinsic_dimension
from stillroom.intrinsic_dimension.search import Dimension
from stillroom.intrinsic_dimension.trial import TrialOptions
from stillroom.models import load_model
from stillroom.pull import pull
from stillroom.training.options import TrainingOptions
from tasks.stages import as_json
from tasks.store.record import Record
from tasks.store.store import ArtifactStore, open_store
from tasks.trials import search_of
from tests.flows.terminal import ROOT, Terminal, assert_refused, assert_sound

HEAVY = {"torch", "transformers", "peft", "matplotlib", "datasets"}
COMMAND = "measure-intrinsic-dimension"
RECIPES = sorted(Path("deployments/recipes/intrinsic_dimension").glob("*.yaml"))
WAIT_SECONDS = 400
RECIPE: dict[str, Any] = {
    "name": "tiny-dimension",
    "task": "sequence_classification",
    "model": {"source": "encoder"},
    "data": {
        "train": {"source": "labelled.jsonl", "label_column": "label"},
        "held_out_fraction": 0.3,
        "sequence_length": 16,
        "calibration_rows": 1,
    },
    "full": {"steps": 60, "batch_rows": 8, "learning_rate": 0.003},
    "subspace": {"steps": 60, "batch_rows": 8, "learning_rate": 0.015},
    "search": {"min_dimension": 4, "max_dimension": 512, "grid_points": 2, "tolerance": 100,
               "workers": 2},
    "execution": {"threads": 2},
    "publish": {"name": "tiny-encoder"},
}  # fmt: skip
FLOW = """
import json, os, sys
from pathlib import Path
from tasks.settings import Settings
os.environ.update(Settings().environment())
from flows.measure_intrinsic_dimension import measure_intrinsic_dimension
from stillroom.config import load_dimension_recipe
recipe = load_dimension_recipe(Path(sys.argv[1]))
state = measure_intrinsic_dimension(recipe, return_state=True)
print(json.dumps(state.result().found.as_json()))
"""
SERVE = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[2])
model = mlflow.pyfunc.load_model(sys.argv[1])
texts = ["abcde" * 5, "uvwxy" * 5]
print(json.dumps(list(model.predict(texts)["label"])))
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def user(terminal: Callable[..., Terminal]) -> Terminal:
    """A terminal with an encoder, and sentences whose class is which words they are made of."""
    import random

    from stillroom.models import save_model
    from tests.stillroom.tiny import tiny_bert_classifier, tiny_masked_tokenizer

    opened = terminal()
    encoder = tiny_bert_classifier(layers=2, hidden=32, vocab=60).bert
    save_model(encoder, tiny_masked_tokenizer(), opened.folder / "encoder")
    chance = random.Random(0)
    lines = []
    for _ in range(160):
        label, letters = chance.choice([("low", "abcde"), ("high", "uvwxy")])
        text = "".join(chance.choices(letters + "mnop", k=24))
        lines.append(json.dumps({"text": text, "label": label}))
    (opened.folder / "labelled.jsonl").write_text("\n".join(lines))
    opened.write(RECIPE)
    return opened


def run(user: Terminal, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(command) or user.command(COMMAND, "recipe.yaml"),
        cwd=user.folder,
        env=user.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )


def kill_after(user: Terminal, trials: int) -> dict[str, Record]:
    """Start the command, kill it when so many trials are finished, and return these."""
    with (user.folder / "killed.log").open("wb") as log:
        flow = subprocess.Popen(
            user.command(COMMAND, "recipe.yaml"),
            cwd=user.folder,
            env=user.environment(),
            stdout=log,
            stderr=log,
        )
    try:
        while len(user.records("trial")) < trials:
            assert flow.poll() is None, (user.folder / "killed.log").read_text()
            flow_children = psutil.Process(flow.pid).children()
            psutil.wait_procs(flow_children, timeout=0.2)
        os.kill(flow.pid, signal.SIGKILL)
    finally:
        flow.kill()
        flow.wait(WAIT_SECONDS)
    # They die with their flow: a rerun must not meet them.
    _, alive = psutil.wait_procs(flow_children, timeout=60)
    assert not alive
    return {record.key: record for record in user.records("trial")}


def by_library(user: Terminal) -> Dimension:
    """Measure the same with the library alone, one trial after the other."""
    recipe = load_dimension_recipe(user.folder / "recipe.yaml")
    (prepared,) = user.records("dataset")
    data = load_prepared(user.store.fetch(prepared, user.folder / "prepared"))
    options = TrialOptions(
        full=TrainingOptions(**recipe.full.model_dump()),
        subspace=TrainingOptions(**recipe.subspace.model_dump()),
    )

    def load(seed: int) -> Any:
        return load_base(
            user.folder / "encoder",
            task="sequence_classification",
            label_names=data.train.label_names,
            head_seed=seed,
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker's share
    try:
        search = search_of(as_json(recipe.search), recipe.task, recipe.seed)
        return measure_intrinsic_dimension(load, (data.train, data.evaluation), search, options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_search_goes_on_and_flow_command_and_library_agree(user: Terminal) -> None:
    before = kill_after(user, trials=4)
    assert not user.records("intrinsic-dimension")
    assert_sound(user)

    done = run(user)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {record.key: record for record in user.records("trial")}
    assert {key: after[key] for key in before} == before, "a finished trial was repeated"
    assert (done.stdout + done.stderr).count("in state Cached(") == 2 + len(before)
    file = user.home / "reports" / "tiny-dimension" / "intrinsic_dimension.json"
    found = Dimension.from_json(json.loads(file.read_text()))
    assert found.reached
    assert len(found.curve) == 3  # both ends, and one between
    assert found.sentence() in done.stdout
    assert file.with_name("curve.png").read_bytes().startswith(b"\x89PNG")

    assert by_library(user) == found
    again = run(user, sys.executable, "-c", FLOW, "recipe.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert Dimension.from_json(json.loads(again.stdout.splitlines()[-1])) == found
    assert {record.key for record in user.records("trial")} == after.keys()

    # The base and the subspace, once each, although three runs registered them.
    assert user.versions() == 2
    uri = "models:/tiny-encoder-subspace@champion"
    tracking = f"sqlite:///{user.home / 'mlflow.db'}"
    pull(uri, user.folder / "pulled", tracking_uri=tracking)
    pull(uri, user.folder / "merged", merged=True, tracking_uri=tracking)
    task = "sequence_classification"
    moved = load_with_base(
        user.folder / "pulled" / "adapter", user.folder / "pulled" / "base", task=task
    )
    merged = load_model(user.folder / "merged", task=task)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(moved(input_ids=ids).logits, merged(input_ids=ids).logits)
    answer = json.loads(
        run(user, sys.executable, "-c", SERVE, uri, tracking).stdout.splitlines()[-1]
    )
    assert answer == ["low", "high"]


def test_flow_is_imported_without_what_only_stages_need() -> None:
    ask = f"import flows.measure_intrinsic_dimension, sys; print({HEAVY} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_search_recipe_loads_and_plans_its_first_round(
    path: Path, store: ArtifactStore
) -> None:
    recipe = load_dimension_recipe(path)
    stages, whole = plan_search(recipe, store)
    assert not whole
    trials = [line for line in stages if line.kind == "trial"]
    assert len(trials) == recipe.search.seeds * (1 + recipe.search.grid_points)
    assert all(line.estimate.seconds > 0 and line.resolved for line in stages)
    text = "\n".join(print_search(recipe, stages, whole))
    assert "then: dimensions between the last that fails" in text
    assert "min_dimension" in dump_recipe(recipe)


def keys(store: ArtifactStore, *changes: str) -> dict[str, str]:
    stages, _ = plan_search(load_dimension_recipe(RECIPES[0], changes), store)
    return {line.order.title: line.key for line in stages}


def test_what_a_trial_depends_on(store: ArtifactStore) -> None:
    before = keys(store)
    assert keys(store, "search.workers=2", "search.share=0.8", "search.tolerance=2") == before
    other = keys(store, "search.projection=sparse")
    changed = {title for title in before if before[title] != other[title]}
    assert changed == {title for title in before if title.startswith("d-")}
    finer = keys(store, "search.grid_points=5", "search.seeds=4")
    assert before.items() <= finer.items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.max_dimension=64", "expected more than min_dimension, 64, 64 came"),
        ("search.seeds=2", "search.seeds: Input should be greater than or equal to 3"),
        ("model.fine_tune={}", "model.fine_tune: the model is measured as it is"),
        ("publish={name: x, approval: true}", "publish.approval: a subspace is registered by"),
        ("subspace.gradient_checkpointing=true", "activations made again would be the base's"),
        ("execution.training_processes=2", "set search.workers to 2"),
        ("data.masked_fraction=0.3", "data.masked_fraction"),
        ("search.bits=4", "search.bits: unknown key"),
    ],
)
def test_what_a_search_refuses(change: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_dimension_recipe(RECIPES[0], [change])
    assert said in str(refused.value)


@pytest.mark.integration
def test_a_quantized_model_is_refused_in_one_line(user: Terminal) -> None:
    config = user.folder / "encoder" / "config.json"
    values = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(values))
    assert_refused(user.type(COMMAND, "recipe.yaml"), "quantized", "dense")


@dataclass(eq=False)
class Future:
    """A task as Prefect's futures look from outside; those of one list end in its order."""

    state: SimpleNamespace
    running: list["Future"]

    @property
    def _final_state(self) -> bool:
        return self.running[0] is self

    def wait(self) -> None:
        self.running.remove(self)


@pytest.mark.parametrize(("workers", "begun"), [(1, "ab"), (2, "abc"), (3, "abcd")])
def test_after_a_failure_no_further_trial_begins(workers: int, begun: str) -> None:
    from flows.measure_intrinsic_dimension import _side_by_side

    orders = [SimpleNamespace(key=key) for key in "abcdef"]
    running: list[Future] = []

    def submit(order: SimpleNamespace) -> Future:
        future = Future(SimpleNamespace(is_failed=lambda: order.key == "b"), running)
        running.append(future)
        return future

    assert "".join(_side_by_side(orders, submit, workers)) == begun
    everything = _side_by_side([orders[0], *orders[2:]], submit, workers)
    assert everything.keys() == set("acdef")
    assert running == []
