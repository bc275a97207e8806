from dataclasses import replace

import pytest
import torch
from torch import nn

from stillroom.checkpoint import TRIES, FolderCheckpoints
from stillroom.errors import PieceGoneError
from stillroom.training.history import TrainingHistory
from stillroom.training.state import TrainingState


def state(folder):
    parameters = {"weight": nn.Parameter(torch.zeros(3))}
    return TrainingState(
        parameters, torch.optim.AdamW(parameters.values()), {}, FolderCheckpoints(folder)
    )


def test_a_slower_run_of_the_same_training_leaves_what_the_faster_kept(tmp_path):
    slow, fast = state(tmp_path), state(tmp_path)
    for step in (10, 20):
        fast.save_best(step)
    fast.save(20, TrainingHistory(best_step=20))
    slow.save(15, TrainingHistory(best_step=10))
    assert slow.checkpoints.names() == ["best-00000020", "step-00000015", "step-00000020"]
    fast.take_best(20)


class Busy(FolderCheckpoints):
    """Checkpoints of which, before one is loaded, another run keeps the next."""

    def __init__(self, folder, other, saves):
        super().__init__(folder)
        self.other, self.saves, self.step = other, saves, 10

    def load(self, name, folder):
        if self.saves:
            self.saves -= 1
            self.step += 10
            self.other.save(self.step, TrainingHistory(best_step=self.step))
        super().load(name, folder)


def beside_a_run_at_work(folder, saves):
    first = state(folder)
    with torch.no_grad():
        first.parameters["weight"].fill_(1.0)
    first.save(10, TrainingHistory(best_step=10))
    second = state(folder)
    return replace(second, checkpoints=Busy(folder, first, saves))


@pytest.mark.parametrize("saves", [0, 1, TRIES - 1])
def test_resuming_goes_on_from_the_checkpoint_that_replaced_the_first_found(tmp_path, saves):
    second = beside_a_run_at_work(tmp_path, saves)
    step, history = second.resume()
    assert (step, history.best_step) == (10 * (saves + 1), 10 * (saves + 1))
    assert second.parameters["weight"].tolist() == [1.0, 1.0, 1.0]


def test_resuming_ends_where_each_checkpoint_is_gone_before_it_is_loaded(tmp_path):
    second = beside_a_run_at_work(tmp_path, saves=100)
    with pytest.raises(PieceGoneError, match="another run of the same training is at work"):
        second.resume()
    assert second.parameters["weight"].tolist() == [0.0, 0.0, 0.0]


def test_resuming_begins_anew_where_the_other_run_has_forgotten_all(tmp_path):
    second = beside_a_run_at_work(tmp_path, saves=0)
    real = second.checkpoints.load

    def load(name, folder):
        second.checkpoints.delete(name)
        real(name, folder)

    second.checkpoints.load = load
    assert second.resume() == (0, TrainingHistory())


class Others:
    """A team of which this process is the second; the first has found `step`."""

    rank = 1

    def __init__(self, step, gone):
        self.step, self.gone = step, list(gone)

    def first(self, figures):
        return {"step": float(self.step)}

    def sum(self, figures):
        return {"gone": figures["gone"] + float(self.gone.pop(0))}


def test_a_team_resumes_at_what_the_first_found_and_all_could_load(tmp_path):
    first = state(tmp_path)
    first.save(20, TrainingHistory(best_step=20))
    # Another run has kept a newer one since the first process looked.
    state(tmp_path).checkpoints.save("step-00000030", tmp_path / "step-00000020")
    others = Others(20, gone=[True, False])
    step, _ = replace(first, team=others).resume()
    assert step == 20
    assert others.gone == []
