"""One process of a team that trains: `team_member FOLDER KIND PARALLEL [FURTHER]`.

FURTHER is a step to stop at, or nan, or patient.
"""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import LoraOptions
from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import NotFiniteError
from stillroom.fine_tuning import cross_entropy, fine_tune
from stillroom.training.loop import train
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import labelled_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama

OPTIONS = TrainingOptions(
    steps=5,
    batch_rows=2,
    gradient_accumulation=4,
    learning_rate=1e-2,
    checkpoint_every_steps=2,
    seed=5,
)
# On OTHERS it gets better until it knows which words there are, then worse.
PATIENT = replace(
    OPTIONS, steps=30, learning_rate=2e-2, evaluate_every_steps=1, early_stopping_patience=2
)
FEW_WORDS, OTHERS = token_rows(8, vocab=12), token_rows(8, vocab=12, seed=1)
EXAMPLES = {
    "llama": token_rows(8, padding=7),  # uneven padding: batches do not weigh the same
    "lora": token_rows(8, padding=7),
    "bert": labelled_rows(7),  # drops out
}


def model(kind: str) -> Any:
    """Return the model to train, the same in every process."""
    if kind == "bert":
        return tiny_bert_classifier()
    if kind == "llama":
        return tiny_llama()
    adapted = AdaptedModel(tiny_llama())
    options = LoraOptions(rank=2, dropout=0.1, target_modules=("q_proj", "down_proj"))
    adapted.add("a", options)
    adapted.trainable("a")
    return adapted


class Stopped(Exception):
    """Raised where a test interrupts the run."""


def main(folder: Path, kind: str, parallel: Any, further: str = "") -> None:
    """Train, and leave curves and parameters."""
    torch.set_num_threads(1)
    options, student = replace(OPTIONS, parallel=parallel), model(kind)
    left: dict[str, Any] = {}

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if further.isdigit() and done == int(further):
            raise Stopped

    def bad(model: nn.Module, batch: Any) -> Any:
        bad.calls = getattr(bad, "calls", 0) + 1  # type: ignore[attr-defined]
        loss, figures = cross_entropy(model, batch)
        alone = os.environ["RANK"] == "0" and bad.calls == 3  # type: ignore[attr-defined]
        return loss * (math.nan if alone else 1.0), figures

    try:
        if further == "nan":
            train(student, EXAMPLES[kind], bad, options)
        if further == "patient":
            patient = replace(PATIENT, parallel=parallel)
            history = fine_tune(student, FEW_WORDS, patient, evaluation=OTHERS)
        else:
            history = fine_tune(
                student,
                EXAMPLES[kind],
                options,
                evaluation=EXAMPLES[kind],
                checkpoints=FolderCheckpoints(folder / "checkpoints"),
                progress=progress,
            )
        left = json.loads(history.to_json())
        left.pop("tokens_per_second")
    except NotFiniteError as error:
        left = {"error": str(error)}
    except Stopped:
        left = {"stopped": further}
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(left))
    tensors = {name: value.detach().clone() for name, value in student.named_parameters()}
    save_file(tensors, folder / f"{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
