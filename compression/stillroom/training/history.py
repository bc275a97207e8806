"""What happened in a training run, step by step."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

HELD_OUT_LOSS = "held_out_cross_entropy_nats"
HELD_OUT_KL = "held_out_kl_nats"


@dataclass
class TrainingHistory:
    """Curves of a training run: the lists are parallel, one entry a step or an evaluation.

    `best_step` is the step whose parameters stayed, where the best were to stay; 0: the last.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    evaluation_steps: list[int] = field(default_factory=list)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    best_step: int = 0

    def add_figures(self, figures: dict[str, float]) -> None:
        """Append the named figures of the step that was added last."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def add_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Append the figures measured on held-out rows after `step`."""
        self.evaluation_steps.append(step)
        for name, value in figures.items():
            self.evaluations.setdefault(name, []).append(value)

    def kept(self) -> dict[str, float]:
        """Return the figures on held-out rows of the parameters that stayed."""
        place = self.evaluation_steps.index(self.best_step) if self.best_step else -1
        return {name: values[place] for name, values in self.evaluations.items()}

    def evaluations_since_best(self) -> int:
        """Return how many evaluations came after the best one."""
        return sum(step > self.best_step for step in self.evaluation_steps)

    def to_json(self) -> str:
        """Return the history as one JSON object."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TrainingHistory":
        """Return the history that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{entry.name: values[entry.name] for entry in fields(cls)})
