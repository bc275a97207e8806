"""Free memory is kept for as long as that was asked for."""

import gc
import platform
import resource

import pytest
import torch

from stillroom.memory import keeping_free_memory, return_free_memory

MEGABYTES = 48  # above the 32 that glibc keeps at most by itself


def faults():
    """Return how many pages a large tensor needs anew that was there before."""
    torch.zeros(MEGABYTES << 18)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(MEGABYTES << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_was_freed_is_not_cleared_again_while_it_is_kept():
    with keeping_free_memory():
        kept = faults()
    assert kept < faults() / 4
    with pytest.raises(RuntimeError), keeping_free_memory():
        raise RuntimeError
    assert kept < faults() / 4


def test_memory_can_be_given_back_anywhere():
    return_free_memory()
