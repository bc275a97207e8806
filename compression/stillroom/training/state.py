"""Checkpoints of the training loop: parameters, optimizer moments, history; exact on resume."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.checkpoint import Checkpoints
from stillroom.errors import MismatchError
from stillroom.training.history import TrainingHistory

PREFIX = "step-"


@dataclass(frozen=True)
class TrainingState:
    """All that changes while the loop runs; random numbers come from (seed, step) instead.

    `identity` is what two runs must share for one to continue the other.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]

    def save(self, checkpoints: Checkpoints, step: int, history: TrainingHistory) -> None:
        """Keep the state after `step` as the piece step-00000050, then delete older ones."""
        name = f"{PREFIX}{step:08d}"
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            # Clones own their memory: safetensors refuses views into a shared storage.
            tensors = {key: value.detach().clone() for key, value in self.parameters.items()}
            save_file(tensors, folder / "parameters.safetensors")
            save_file(self._moments(), folder / "optimizer.safetensors")
            state = {"identity": self.identity, "step": step, "history": history.to_json()}
            (folder / "state.json").write_text(json.dumps(state, sort_keys=True))
            checkpoints.save(name, folder)
        for old in checkpoints.names():
            if old.startswith(PREFIX) and old != name:
                checkpoints.delete(old)

    def resume(self, checkpoints: Checkpoints) -> tuple[int, TrainingHistory]:
        """Load the newest checkpoint into parameters and optimizer; return its step and history.

        Without one: step 0 and an empty history.

        Raises:
            MismatchError: the checkpoint was made by another run.
            CorruptedError: its files have changed.
        """
        names = [name for name in checkpoints.names() if name.startswith(PREFIX)]
        if not names:
            return 0, TrainingHistory()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            checkpoints.load(names[-1], folder)
            state = json.loads((folder / "state.json").read_text())
            require_same(names[-1], state["identity"], self.identity)
            tensors = load_file(folder / "parameters.safetensors")
            self._check_shapes(names[-1], tensors)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(tensors[name])
            self._restore_moments(load_file(folder / "optimizer.safetensors"))
        return state["step"], TrainingHistory.from_json(state["history"])

    def _moments(self) -> dict[str, Tensor]:
        # A name of a parameter holds dots but never a slash.
        return {
            f"{name}/{moment}": value.detach().clone()
            for name, parameter in self.parameters.items()
            for moment, value in self.optimizer.state[parameter].items()
        }

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        for key, value in moments.items():
            name, moment = key.rsplit("/", 1)
            parameter = self.parameters[name]
            # Only the step count stays where the optimizer keeps it; moments follow the parameter.
            kept = torch.empty_like(value, device=parameter.device).copy_(value)
            self.optimizer.state[parameter][moment] = kept

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
