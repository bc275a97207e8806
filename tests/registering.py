"""A registry in a folder, and tiny models in it: what the tests of both sides of MLflow share."""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import load_adapter, save_adapter
from stillroom.adapters.options import LoraOptions
from stillroom.models import load_model, save_model
from stillroom.quantization.formats.export import save_quantized
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from tasks.registry import Candidate, Registered, register_adapter, register_base
from tasks.tracking import ParentRun, begin_parent_run, connect, ensure_experiment
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import (
    tiny_bert_classifier,
    tiny_bert_masked,
    tiny_llama,
    tiny_masked_tokenizer,
    tiny_tokenizer,
)

TEXTS = ["hello there", "Abc", "some more text."]


@dataclass
class Place:
    """MLflow in a folder: a SQLite file, and a folder for the runs' files."""

    root: Path
    client: Any
    parent: ParentRun

    @property
    def uri(self) -> str:
        return str(self.client.tracking_uri)

    def candidate(self, name: str, folder: Path, key: str, **more: Any) -> Candidate:
        task = more.pop("task", "causal_lm")
        return Candidate(name, folder, task, key, self.parent.run_id, "Apache-2.0", **more)


@cache
def _empty_database() -> Path:
    """Return a database whose tables are made: making them takes longer than most tests."""
    file = Path(mkdtemp(prefix="stillroom-mlflow-")) / "empty.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


def new_database(folder: Path) -> str:
    shutil.copyfile(_empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def new_place(root: Path, uri: str | None = None) -> Place:
    client = connect(uri or new_database(root))
    experiment = ensure_experiment(client, "tiny", (root / "files").as_uri())
    parent = begin_parent_run(
        client, experiment, flow_run_id="flow-1", name="tiny", recipe={"name": "tiny"}
    )
    return Place(root, client, parent)


def llama_folder(root: Path, seed: int = 0) -> Path:
    folder = root / f"llama-{seed}"
    if not folder.exists():
        save_model(tiny_llama(seed), tiny_tokenizer(), folder)
    return folder


def quantized_folder(root: Path) -> Path:
    model = tiny_llama()
    result = quantize_model(model, token_rows(), QuantizationOptions(4, 16))
    save_quantized(model, tiny_tokenizer(), result, root / "quantized")
    return root / "quantized"


def classifier_folder(root: Path) -> Path:
    folder = root / "classifier"
    tokenizer = tiny_tokenizer()
    save_model(tiny_bert_classifier(), tokenizer, folder)
    return folder


def masked_folder(root: Path) -> Path:
    folder = root / "masked"
    save_model(tiny_bert_masked(vocab=60), tiny_masked_tokenizer(), folder)
    return folder


def adapter_folder(root: Path, base: Path) -> Path:
    """Return an adapter whose update is not zero."""
    adapted = AdaptedModel(load_model(base, weights="packed"))
    adapted.add("law", LoraOptions(rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    save_adapter(adapted, "law", root / "adapter", "the store's key")
    return root / "adapter"


def register_pair(place: Place, folder: Path | None = None) -> tuple[Registered, Registered]:
    """Return a registered base and an adapter on it."""
    folder = folder or llama_folder(place.root)
    base = register_base(place.client, place.candidate("tiny", folder, "a" * 64))
    candidate = place.candidate("tiny-law", adapter_folder(place.root, folder), "b" * 64)
    return base, register_adapter(place.client, candidate, base)


def logits(model: Any) -> torch.Tensor:
    """Return what a model says to a fixed row, (1, tokens, words)."""
    row = torch.arange(4, 24).unsqueeze(0)  # (1, 20)
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=row).logits
    return result


def adapted_logits(root: Path, base: Path | None = None) -> torch.Tensor:
    """Return what base and adapter say together, from the folders they were registered from."""
    return logits(load_adapter(load_model(base or llama_folder(root)), root / "adapter"))
