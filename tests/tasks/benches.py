"""A stage's bench without a flow: folders in, an empty output, no checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillroom.checkpoint import NoCheckpoints
from stillroom.progress import silent
from tasks.stages import Order, Stage
from tasks.work.bench import Bench


def new_bench(
    stage: Stage, section: dict[str, Any], folder: Path, inputs: dict[str, Path]
) -> Bench:
    """Return a bench for one run of `stage` below `folder`, on a causal language model."""
    output = folder / "output"
    output.mkdir()
    return Bench(
        order=Order(
            title=stage.name,
            stage=stage,
            section=section | {"task": "causal_lm", "device": "cpu"},
            seed=0,
            inputs={role: role[0] * 64 for role in inputs},
        ),
        inputs=inputs,
        records=dict.fromkeys(inputs, SimpleNamespace(licence="none")),  # type: ignore[arg-type]
        scratch=folder / "scratch",
        output=output,
        checkpoints=NoCheckpoints(),
        progress=silent,
    )
