"""Checkpoints of the training loop: parameters, optimizer moments, history; exact on resume."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.checkpoint import TRIES, Checkpoints
from stillroom.errors import MismatchError, PieceGoneError
from stillroom.training.history import TrainingHistory
from stillroom.training.team import Team, gathered, like_shares, of_first

PREFIX = "step-"
BEST = "best-"


@dataclass(frozen=True)
class TrainingState:
    """All that changes while the loop runs; random numbers come from (seed, step) instead.

    `identity` is what two runs must share for one to continue the other. Where a team of processes
    trains, all of them call these methods, and the first keeps the pieces.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    checkpoints: Checkpoints
    team: Team | None = None

    def save(self, step: int, history: TrainingHistory) -> None:
        """Keep the state after `step` as the piece step-00000050, then delete what it replaces.

        What another run of the same training has kept of later steps stays.
        """
        state = {"identity": self.identity, "step": step, "history": history.to_json()}
        tensors = {"parameters": self._whole(), "optimizer": self._moments()}
        self._keep(f"{PREFIX}{step:08d}", tensors, state)
        # Until now an interrupted run could have gone back to before the best one.
        self._forget(BEST, before=f"{BEST}{history.best_step:08d}")

    def save_best(self, step: int) -> None:
        """Keep the parameters after `step` as the piece best-00000050, beside older ones."""
        self._keep(f"{BEST}{step:08d}", {"parameters": self._whole()}, None)

    def take_best(self, step: int) -> None:
        """Load the parameters that `save_best` kept after `step`; who wrote them reads for all."""
        tensors = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in self.parameters.items()}
        if self._writes():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                self.checkpoints.load(f"{BEST}{step:08d}", folder)
                tensors = load_file(folder / "parameters.safetensors")
        self._set_parameters(
            {name: of_first(tensors[name].to(p.device)) for name, p in self.parameters.items()}
        )

    def resume(self) -> tuple[int, TrainingHistory]:
        """Load the newest checkpoint into parameters and optimizer; return its step and history.

        Without one: step 0 and an empty history. One that another run of the same training, at
        work meanwhile, forgets for a newer one is left for that.

        Raises:
            MismatchError: the checkpoint was made by another run.
            CorruptedError: its files have changed.
            PieceGoneError: each that was tried was forgotten before it was loaded.
        """
        for _ in range(TRIES):
            step = self._newest()
            if step is None:
                return 0, TrainingHistory()
            name = f"{PREFIX}{step:08d}"
            with tempfile.TemporaryDirectory() as temporary:
                if self._fetched(name, Path(temporary)):
                    return self._restore(name, Path(temporary))
        raise PieceGoneError(
            f"{TRIES} checkpoints were forgotten before they were loaded, the last of step {step}: "
            "another run of the same training is at work; run again when that has ended"
        )

    def _newest(self) -> int | None:
        """Return the step of the newest checkpoint, as the first process of the team sees it."""
        names = [name for name in self.checkpoints.names() if name.startswith(PREFIX)]
        step = int(names[-1].removeprefix(PREFIX)) if names else -1
        if self.team is not None:
            step = int(self.team.first({"step": step})["step"])
        return None if step < 0 else step

    def _fetched(self, name: str, folder: Path) -> bool:
        """Load a piece, unless it is gone; return whether the whole team has it."""
        gone = 0
        try:
            self.checkpoints.load(name, folder)
        except PieceGoneError:
            gone = 1
        if self.team is not None:
            gone = int(self.team.sum({"gone": gone})["gone"])
        return not gone

    def _restore(self, name: str, folder: Path) -> tuple[int, TrainingHistory]:
        state = json.loads((folder / "state.json").read_text())
        require_same(name, state["identity"], self.identity)
        tensors = load_file(folder / "parameters.safetensors")
        self._check_shapes(name, tensors)
        self._set_parameters(tensors)
        self._restore_moments(load_file(folder / "optimizer.safetensors"))
        return state["step"], TrainingHistory.from_json(state["history"])

    def _keep(self, name: str, tensors: dict[str, dict[str, Tensor]], state: Any) -> None:
        if not self._writes():
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for file, content in tensors.items():
                save_file(content, folder / f"{file}.safetensors")
            if state is not None:
                (folder / "state.json").write_text(json.dumps(state, sort_keys=True))
            self.checkpoints.save(name, folder)
        if name.startswith(PREFIX):
            self._forget(PREFIX, before=name)

    def _forget(self, prefix: str, *, before: str) -> None:
        if self._writes():
            for old in self.checkpoints.names():
                if old.startswith(prefix) and old < before:
                    self.checkpoints.delete(old)

    def _writes(self) -> bool:
        return self.team is None or self.team.rank == 0

    def _whole(self) -> dict[str, Tensor]:
        # Each owns its memory: safetensors refuses views into a shared storage.
        return {name: gathered(value) for name, value in self.parameters.items()}

    def _set_parameters(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like_shares(tensors[name], parameter))

    def _moments(self) -> dict[str, Tensor]:
        # A name of a parameter holds dots but never a slash.
        return {
            f"{name}/{moment}": gathered(value)
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state[parameter].items()
        }

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        for key, value in moments.items():
            name, moment = key.rsplit("/", 1)
            parameter = self.parameters[name]
            # The step count is a scalar, which processes do not share out.
            restored = like_shares(value, parameter) if value.dim() else value.to(parameter.device)
            self.optimizer.state[parameter][moment] = restored

    def _check_shapes(self, piece: str, tensors: dict[str, Tensor]) -> None:
        saved = {name: tuple(value.shape) for name, value in tensors.items()}
        here = {name: tuple(value.shape) for name, value in self.parameters.items()}
        if saved != here:
            differing = sorted(name for name in saved | here if saved.get(name) != here.get(name))
            raise MismatchError(
                f"checkpoint {piece} was made for other trainable parameters: "
                f"{', '.join(differing[:3])} differ; delete it to start anew"
            )


def require_same(piece: str, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a checkpoint whose identity differs from this run's.

    Raises:
        MismatchError: naming each entry that differs.
    """
    differences = [
        f"{name} was {saved.get(name)!r} and is {here.get(name)!r}"
        for name in sorted(saved | here)
        if saved.get(name) != here.get(name)
    ]
    if differences:
        raise MismatchError(
            f"checkpoint {piece} was made under another configuration: "
            f"{'; '.join(differences)}; delete it to start anew, or run as before"
        )
