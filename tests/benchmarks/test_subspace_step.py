import torch

from benchmarks.adapters import subspace_step
from benchmarks.adapters.work import random_rows
from benchmarks.sst2 import LENGTH


def test_claims_say_what_was_promised() -> None:
    found = {"transform_seconds": 0.5, "subspace_over_full": 2.5}
    transform, step = subspace_step.claims_of(found)
    assert transform.holds
    assert transform.claim == "seconds of the transform of 2^24 floats"
    assert not step.holds
    assert step.bound == 2.0


def test_the_rows_are_of_the_size_that_is_claimed() -> None:
    rows = random_rows(LENGTH)
    assert rows.input_ids.shape == (32, 64)
    assert torch.equal(rows.attention_mask, torch.ones_like(rows.input_ids))
