"""The one training loop: AdamW over whatever parameters want a gradient, resumable exactly."""

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints, FolderCheckpoints
from stillroom.data.examples import Examples
from stillroom.errors import DataError, NotFiniteError, RecipeError
from stillroom.memory import keeping_free_memory
from stillroom.progress import Progress, silent
from stillroom.training.batches import Batch, RowOrder, of_one_step
from stillroom.training.history import HELD_OUT_LOSS, TrainingHistory
from stillroom.training.modes import mode, recomputing
from stillroom.training.options import (
    TrainingOptions,
    derived_seed,
    learning_rate_at,
    total_steps,
)
from stillroom.training.parameters import adamw, trainable_parameters
from stillroom.training.state import TrainingState
from stillroom.training.team import Team, gathered, joined
from stillroom.training.tied_embedding import Lookups, apart_from_the_head


class LossFunction(Protocol):
    """What is minimised: a mean over the batch's predictions, with figures worth plotting."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar loss and named figures, each a mean over the batch's predictions.

        A mean over its tokens is multiplied by `batch.token_weight`.
        """


@dataclass(frozen=True)
class HeldOut:
    """How a model is measured in training, on rows that it does not learn from.

    `watch` names the figure of `measure` that early stopping goes by; lower is better.
    """

    measure: Callable[[nn.Module], dict[str, float]]
    watch: str = HELD_OUT_LOSS


def train(
    model: nn.Module,
    examples: Examples,
    loss: LossFunction,
    options: TrainingOptions,
    *,
    held_out: HeldOut | None = None,
    checkpoints: Checkpoints | None = None,
    fingerprint: str = "",
    progress: Progress = silent,
) -> TrainingHistory:
    """Minimise `loss` over the parameters of `model` that require a gradient, in place.

    With `checkpoints` the run continues where the last one stopped, and ends with the same bytes
    as an uninterrupted run on the same machine, versions and thread count: the order of rows and
    the dropout depend on (seed, step) alone. `fingerprint` names everything else that the result
    depends on (model, loss, teacher). Where this process is one of several
    (`stillroom.training.team`), each takes its part of a step's batches, and all end with the same
    parameters.

    Raises:
        DataError: there is no row.
        MismatchError: the checkpoint was made under another fingerprint, options or rows.
        NotFiniteError: the loss or the gradient is NaN or infinite; the parameters are those of
            the step before, and the last checkpoint stays.
        RecipeError: early stopping has nothing to go by; the step's batches cannot be dealt out
            evenly; a parameter that requires a gradient is float16.
        StageError: no parameter requires a gradient.
    """
    if len(examples) == 0:
        raise DataError("training: expected at least one row of tokens, got none; add text")
    if options.early_stopping_patience and held_out is None:
        raise RecipeError(
            f"early_stopping_patience {options.early_stopping_patience} needs rows that are held "
            "out to go by, and there are none: give evaluation text, or set it to 0"
        )
    steps = total_steps(options, len(examples))
    trainable_parameters(model)
    with ExitStack() as stack:
        stack.enter_context(keeping_free_memory())
        stack.enter_context(mode(model, training=True))
        stack.enter_context(recomputing(model, wanted=options.gradient_checkpointing))
        team = stack.enter_context(joined(model, options.parallel))
        parameters = trainable_parameters(team.module)
        if checkpoints is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            checkpoints = FolderCheckpoints(Path(folder))
        state = TrainingState(
            parameters,
            adamw(parameters, options),
            _identity(options, fingerprint, rows=len(examples), steps=steps),
            checkpoints,
            team,
        )
        lookups = stack.enter_context(apart_from_the_head(team))
        run = _Run(team, examples, loss, options, state, held_out, lookups)
        return run.go(steps, progress)


@dataclass
class _Run:
    team: Team
    examples: Examples
    loss: LossFunction
    options: TrainingOptions
    state: TrainingState
    held_out: HeldOut | None
    lookups: Lookups

    def __post_init__(self) -> None:
        count = self.options.gradient_accumulation
        if count % self.team.size:
            raise RecipeError(
                f"gradient_accumulation: a step's {count} batches cannot be dealt out evenly to "
                f"{self.team.size} processes; take a multiple of {self.team.size}"
            )
        lengths = self.examples.attention_mask.sum(1) if self.options.bucket_by_length else None
        self.order = RowOrder(
            len(self.examples),
            self.options.seed,
            batch_rows=self.options.batch_rows,
            lengths=lengths,
        )
        self.device = next(self.team.module.parameters()).device

    def go(self, steps: int, progress: Progress) -> TrainingHistory:
        """Do the steps that are left, and return the history of all."""
        options = self.options
        start, history = self.state.resume()
        for step in range(start + 1, steps + 1):
            if self._stopped(history):
                break
            self.step(step, steps, history)
            last, every = step == steps, options.evaluate_every_steps
            if self.held_out and (last or (every and step % every == 0)):
                self._look(step, history, self.held_out)
            if not last and step % options.checkpoint_every_steps == 0:
                self.state.save(step, history)
            progress(step, steps, "steps", f"loss {history.loss[-1]:.4f}")
        if history.best_step not in (0, history.steps[-1]):
            self.state.take_best(history.best_step)
        return history

    def _look(self, step: int, history: TrainingHistory, held_out: HeldOut) -> None:
        with mode(self.team.module, training=False), torch.no_grad():
            figures = self.team.first(held_out.measure(self.team.module))
        history.add_evaluation(step, figures)
        if self.options.early_stopping_patience:
            figure = figures[held_out.watch]
            best = history.kept()[held_out.watch] if history.best_step else math.inf
            if figure < best:  # which nothing is that is no number
                history.best_step = step
                self.state.save_best(step)

    def _stopped(self, history: TrainingHistory) -> bool:
        patience = self.options.early_stopping_patience
        return bool(patience) and history.evaluations_since_best() >= patience

    def step(self, step: int, steps: int, history: TrainingHistory) -> None:
        """Do one optimizer step and append it to the history."""
        began = time.perf_counter()
        batches = self._batches(step)
        optimizer = self.state.optimizer
        rate = learning_rate_at(step, steps, self.options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss, figures = self._accumulate(step, batches)
        norm = self._clip(step)
        optimizer.step()
        seconds = time.perf_counter() - began
        tokens = sum(batch.tokens for batch in batches)
        history.steps.append(step)
        history.loss.append(loss)
        history.learning_rate.append(rate)
        history.gradient_norm.append(norm)
        history.tokens_per_second.append(tokens / seconds)
        history.add_figures(figures)

    def _batches(self, step: int) -> list[Batch]:
        size, count = self.options.batch_rows, self.options.gradient_accumulation
        first = (step - 1) * size * count
        return of_one_step(
            [
                Batch.of(self.examples, self.order.rows_at(first + i * size, size), self.device)
                for i in range(count)
            ]
        )

    def _accumulate(self, step: int, batches: list[Batch]) -> tuple[float, dict[str, float]]:
        # Weighted by their predictions, so that several small batches equal one large one.
        total = max(sum(batch.predictions for batch in batches), 1)
        mine = range(self.team.rank, len(batches), self.team.size)
        means: dict[str, float] = {}
        bad: list[int] = []
        for place in mine:
            batch = batches[place]
            share = batch.predictions / total
            loss, found = self._forward(step, place, batch)
            value = loss.item()
            if not math.isfinite(value):
                bad += batch.rows.tolist()
            with self.team.collecting(last=place == mine[-1]):
                # Processes take the mean of their gradients, which are parts of a sum.
                (loss * (share * self.team.size)).backward()  # type: ignore[no-untyped-call]
            self.lookups.add_gradient()
            for name, figure in ({"": value} | found).items():
                means[name] = means.get(name, 0.0) + figure * share
        means = self.team.sum(means)
        mean = means.pop("")
        if not math.isfinite(mean):
            rows = f"the rows {bad}" if bad else "the log of the process that met it"
            raise NotFiniteError(
                f"step {step}: the loss is {mean}; expected a finite number: "
                f"lower learning_rate or look at {rows}"
            )
        return mean, means

    def _forward(self, step: int, place: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        devices = [self.device] if self.device.type == "cuda" else []
        dtype = self.options.dtype
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            # Of the batch's place, so that it does not matter which process has it.
            torch.manual_seed(derived_seed(self.options.seed, "dropout", step, place))
            return self.loss(self.team.forward, batch)

    def _clip(self, step: int) -> float:
        groups = self.state.optimizer.param_groups
        parameters = [value for group in groups for value in group["params"]]
        total = nn.utils.clip_grad_norm_(parameters, self.options.max_gradient_norm)
        norm = float(gathered(total))
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"step {step}: the gradient's norm is {norm}; expected a finite number: "
                "lower learning_rate"
            )
        return norm


def _identity(
    options: TrainingOptions, fingerprint: str, *, rows: int, steps: int
) -> dict[str, object]:
    identity = asdict(options) | {"fingerprint": fingerprint, "rows": rows, "steps": steps}
    # How often the run stops to save or look does not change where it goes.
    for name in ("checkpoint_every_steps", "epochs", "gradient_checkpointing", "parallel"):
        identity.pop(name)
    if not options.early_stopping_patience:
        identity.pop("evaluate_every_steps")
    return identity
