"""The one training loop: AdamW over whatever parameters want a gradient, resumable exactly."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints, NoCheckpoints
from stillroom.data.examples import Examples
from stillroom.errors import DataError, NotFiniteError, StageError
from stillroom.progress import Progress, silent
from stillroom.training.history import TrainingHistory
from stillroom.training.options import (
    RowOrder,
    TrainingOptions,
    derived_seed,
    learning_rate_at,
    total_steps,
)
from stillroom.training.state import TrainingState


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, on the model's device.

    `rows` (batch,) are their numbers in the examples, on the CPU; `input_ids` and
    `attention_mask` are (batch, length); `labels` is (batch, length) for a causal language model,
    not shifted, or (batch,) for classification; -100 is no label.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def is_causal(self) -> bool:
        """Whether each position predicts the next token, rather than each row its class."""
        return self.labels.dim() == 2

    @property
    def predictions(self) -> int:
        """The number of labels that a loss is taken at; the first token of a row is not one."""
        labels = self.labels[:, 1:] if self.is_causal else self.labels
        return int((labels != -100).sum())


class LossFunction(Protocol):
    """What is minimised: a mean over the batch's predictions, with figures worth plotting."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar loss and named figures, each a mean over the batch's predictions."""


Evaluate = Callable[[nn.Module], dict[str, float]]


def train(
    model: nn.Module,
    examples: Examples,
    loss: LossFunction,
    options: TrainingOptions,
    *,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Minimise `loss` over the parameters of `model` that require a gradient, in place.

    With `checkpoints` the run continues where the last one stopped, and ends with the same bytes
    as an uninterrupted run on the same machine, versions and thread count: the order of rows and
    the dropout depend on (seed, step) alone. `fingerprint` names everything else that the result
    depends on (model, loss, teacher).

    Raises:
        DataError: there is no row.
        MismatchError: the checkpoint was made under another fingerprint, options or rows.
        NotFiniteError: the loss or the gradient is NaN or infinite; the parameters are those of
            the step before, and the last checkpoint stays.
        StageError: no parameter requires a gradient.
    """
    if len(examples) == 0:
        raise DataError("training: expected at least one row of tokens, got none; add text")
    checkpoints = checkpoints or NoCheckpoints()
    steps = total_steps(options, len(examples))
    parameters = trainable_parameters(model)
    identity = _identity(options, fingerprint, rows=len(examples), steps=steps)
    state = TrainingState(parameters, _optimizer(parameters, options), identity)
    start, history = state.resume(checkpoints)
    run = _Run(model, examples, loss, options, state.optimizer)
    with _mode(model, training=True):
        for step in range(start + 1, steps + 1):
            run.step(step, steps, history)
            last = step == steps
            every = options.evaluate_every_steps
            if evaluate and (last or (every and step % every == 0)):
                with _mode(model, training=False), torch.no_grad():
                    history.add_evaluation(step, evaluate(model))
            if not last and step % options.checkpoint_every_steps == 0:
                state.save(checkpoints, step, history)
            progress(step, steps, "steps", f"loss {history.loss[-1]:.4f}")
    return history


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; tied ones once.

    Raises:
        StageError: there is none.
    """
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not found:
        raise StageError("training: no parameter of the model requires a gradient; unfreeze some")
    return found


@dataclass
class _Run:
    model: nn.Module
    examples: Examples
    loss: LossFunction
    options: TrainingOptions
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        self.order = RowOrder(len(self.examples), self.options.seed)
        self.device = next(self.model.parameters()).device

    def step(self, step: int, steps: int, history: TrainingHistory) -> None:
        """Do one optimizer step and append it to the history."""
        began = time.perf_counter()
        batches = self._batches(step)
        rate = learning_rate_at(step, steps, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed(self.options.seed, "dropout", step))
            loss, figures = self._accumulate(step, batches)
        norm = self._clip(step)
        self.optimizer.step()
        seconds = time.perf_counter() - began
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        history.steps.append(step)
        history.loss.append(loss)
        history.learning_rate.append(rate)
        history.gradient_norm.append(norm)
        history.tokens_per_second.append(tokens / seconds)
        history.add_figures(figures)

    def _batches(self, step: int) -> list[Batch]:
        size, count = self.options.batch_rows, self.options.gradient_accumulation
        first = (step - 1) * size * count
        return [self._batch(self.order.rows_at(first + i * size, size)) for i in range(count)]

    def _batch(self, rows: Tensor) -> Batch:
        taken = self.examples.take(rows)
        return Batch(
            rows,
            taken.input_ids.to(self.device),
            taken.attention_mask.to(self.device),
            taken.labels.to(self.device),
        )

    def _accumulate(self, step: int, batches: list[Batch]) -> tuple[float, dict[str, float]]:
        # Weighted by their predictions, so that several small batches equal one large one.
        predictions = [batch.predictions for batch in batches]
        total = max(sum(predictions), 1)
        mean = 0.0
        figures: dict[str, float] = {}
        for batch, count in zip(batches, predictions, strict=True):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"
            ):
                loss, found = self.loss(self.model, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"step {step}: the loss is {value}; expected a finite number: "
                    f"lower learning_rate or look at the rows {batch.rows.tolist()}"
                )
            (loss * (count / total)).backward()  # type: ignore[no-untyped-call]
            mean += value * count / total
            for name, figure in found.items():
                figures[name] = figures.get(name, 0.0) + figure * count / total
        return mean, figures

    def _clip(self, step: int) -> float:
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.options.max_gradient_norm).item()
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"step {step}: the gradient's norm is {norm}; expected a finite number: "
                "lower learning_rate"
            )
        return norm


def _optimizer(
    parameters: dict[str, nn.Parameter], options: TrainingOptions
) -> torch.optim.Optimizer:
    # Biases and norm scales have one dimension, and decay would only pull them off their place.
    decayed = [value for value in parameters.values() if value.dim() > 1]
    others = [value for value in parameters.values() if value.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.learning_rate, fused=True
    )


def _identity(
    options: TrainingOptions, fingerprint: str, *, rows: int, steps: int
) -> dict[str, object]:
    identity = asdict(options) | {"fingerprint": fingerprint, "rows": rows, "steps": steps}
    # How often the run stops to save or look does not change where it goes.
    for name in ("checkpoint_every_steps", "evaluate_every_steps", "epochs"):
        identity.pop(name)
    return identity


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
