"""The curves that a training stage left beside its model."""

from dataclasses import replace
from pathlib import Path

from stillroom.evaluation.report_data import Curve
from stillroom.training.history import HELD_OUT_KL, HELD_OUT_LOSS, TrainingHistory
from tasks.store.record import Record
from tasks.store.store import ArtifactStore

HISTORY = "history.json"
HELD_OUT = {HELD_OUT_LOSS: "held-out loss", HELD_OUT_KL: "held-out KL to the teacher"}


def write_history(history: TrainingHistory, folder: Path) -> None:
    """Leave the curves beside what was trained; without the speeds, which differ each time."""
    (folder / HISTORY).write_text(replace(history, tokens_per_second=[]).to_json())


def read_curves(store: ArtifactStore, record: Record) -> tuple[Curve, ...]:
    """Return the training and held-out curves of an artifact; none where it was not trained."""
    text = store.read_file(record, HISTORY)
    if text is None:
        return ()
    history = TrainingHistory.from_json(text.decode())
    curves = [Curve("training", "loss", "nats", tuple(history.steps), tuple(history.loss))]
    steps = tuple(history.evaluation_steps)
    for figure, name in HELD_OUT.items():
        values = tuple(history.evaluations.get(figure, ()))
        curves.append(Curve("training", name, "nats", steps if values else (), values))
    return tuple(curve for curve in curves if curve.steps)
