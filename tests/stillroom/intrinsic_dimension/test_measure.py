import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import DataError, MismatchError, NotFiniteError
from stillroom.intrinsic_dimension import measure as module
from stillroom.intrinsic_dimension.measure import measure_intrinsic_dimension
from stillroom.intrinsic_dimension.plot import write_plot
from stillroom.intrinsic_dimension.search import Search, Trial
from stillroom.intrinsic_dimension.subspace import SubspaceModel
from stillroom.intrinsic_dimension.trial import TrialOptions, run_trial
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import labelled_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama

TRAINING = TrainingOptions(steps=40, batch_rows=8, learning_rate=3e-3, checkpoint_every_steps=5)
OPTIONS = TrialOptions(TRAINING, replace(TRAINING, learning_rate=0.01))
SEARCH = Search(min_dimension=2, max_dimension=128, grid_points=3, tolerance=2.5, seeds=(0, 1))
ROWS = (labelled_rows(48, 8, vocab=8), labelled_rows(24, 8, seed=1, vocab=8))


def load(seed: int) -> object:
    return tiny_bert_classifier(seed)


class Killed(Exception):
    pass


def test_a_classifier_is_measured_and_an_interrupted_search_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS)
    assert whole.full > 0.9
    assert whole.reached
    assert {point.dimension for point in whole.curve} >= {2, 16, 128}

    done: list[Trial] = []
    stops = [3, 2, 100]

    def trial_that_may_die(trial: Trial, *inputs: object, **options: object) -> object:
        if stops[0] == 0:
            raise Killed
        stops[0] -= 1
        done.append(trial)
        return run_trial(trial, *inputs, **options)

    monkeypatch.setattr(module, "run_trial", trial_that_may_die)
    kept = FolderCheckpoints(tmp_path)
    for _ in range(2):
        with pytest.raises(Killed):
            measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS, checkpoints=kept)
        stops.pop(0)
    again = measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS, checkpoints=kept)
    assert again == whole
    assert len(done) == len(set(done)) == whole.trials
    done.clear()
    assert measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS, checkpoints=kept) == whole
    assert done == []
    other = replace(OPTIONS, projection="sparse")
    with pytest.raises(MismatchError, match="projection"):
        measure_intrinsic_dimension(load, ROWS, SEARCH, other, checkpoints=kept)
    # A finer search takes what there is.
    finer = replace(SEARCH, tolerance=1.2)
    measure_intrinsic_dimension(load, ROWS, finer, OPTIONS, checkpoints=kept)
    assert not set(done) & {Trial(2, 0), Trial(None, 1)}


def test_a_trial_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(step: int, total: int, unit: str, note: str = "") -> None:
        seen.append(step)
        if len(seen) == 12:
            raise Killed

    kept = FolderCheckpoints(tmp_path)
    with pytest.raises(Killed):
        measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS, checkpoints=kept, progress=watch)
    assert kept.names() == ["full-seed-0.step-00000010"]
    measure_intrinsic_dimension(load, ROWS, SEARCH, OPTIONS, checkpoints=kept, progress=watch)
    assert seen[11:13] == [12, 11]
    assert all(name.startswith("finished-") for name in kept.names())


def test_a_language_model_is_measured_from_its_untrained_base(tmp_path: Path) -> None:
    rows = token_rows(16, 12, vocab=12)
    search = replace(SEARCH, from_untrained=True, seeds=(0,))
    found = measure_intrinsic_dimension(lambda seed: tiny_llama(), (rows, rows), search, OPTIONS)
    assert found.untrained is not None
    assert found.full > found.untrained
    write_plot(found, tmp_path / "curve.png")
    write_plot(found, tmp_path / "again.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "again.png").read_bytes()


def test_held_out_rows_are_needed() -> None:
    with pytest.raises(DataError, match="expected some, got none"):
        run_trial(Trial(2, 0), tiny_llama(), (token_rows(), token_rows(0)), OPTIONS)


@pytest.mark.parametrize("dimension", [None, 16])
def test_a_trial_whose_last_step_was_too_long_is_no_score(dimension: int | None) -> None:
    once = TrainingOptions(steps=1, batch_rows=8, learning_rate=1e15, schedule="constant")
    rows = token_rows()
    with pytest.raises(NotFiniteError, match=r"held_out_\w+ is nan; .*lower learning_rate"):
        run_trial(Trial(dimension, 0), tiny_llama(), (rows, rows), TrialOptions(once, once))


def test_first_steps_are_as_long_in_all_parameters_whatever_the_dimension() -> None:
    once = TrainingOptions(steps=1, batch_rows=8, learning_rate=1e-3, schedule="constant")
    options = TrialOptions(once, once)
    for dimension in (16, 512):
        base = tiny_bert_classifier()
        start = {name: value.detach().clone() for name, value in base.named_parameters()}
        model = run_trial(Trial(dimension, 0), base, ROWS, options).model
        assert isinstance(model, SubspaceModel)
        with torch.no_grad():
            moved = model.moved_parameters()
        squares = sum(float((moved[name] - start[name]).square().sum()) for name in start)
        # AdamW's first step moves each number by the rate.
        assert math.sqrt(squares) == pytest.approx(1e-3 * math.sqrt(model.size), rel=0.2)
