import torch
from torch import nn

from stillroom.checkpoint import FolderCheckpoints
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
