"""What happened in a training run, step by step."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainingHistory:
    """Curves of a training run: the lists are parallel, one entry a step or an evaluation."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    evaluation_steps: list[int] = field(default_factory=list)
    evaluations: dict[str, list[float]] = field(default_factory=dict)

    def add_figures(self, figures: dict[str, float]) -> None:
        """Append the named figures of the step that was added last."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Append the figures measured on held-out rows after `step`."""
        self.evaluation_steps.append(step)
        for name, value in figures.items():
            self.evaluations.setdefault(name, []).append(value)

    def to_json(self) -> str:
        """Return the history as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TrainingHistory":
        """Return the history that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})
