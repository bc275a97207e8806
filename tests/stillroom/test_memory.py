"""Free memory is kept for as long as that was asked for."""

import platform
import subprocess
import sys

import pytest

from stillroom.memory import return_free_memory

# In a process of its own, whose heap has no hole that a large tensor fits into.
PROGRAM = """
import resource
from stillroom.memory import keeping_free_memory

def faults():
    bytearray(48 << 20)  # above the 32 MB that glibc keeps at most by itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with keeping_free_memory():
    print(faults())
try:
    with keeping_free_memory():
        raise KeyError
except KeyError:
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_was_freed_is_not_cleared_again_while_it_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, kept, after = map(int, done.stdout.split())
    assert kept < before / 100
    assert after > before / 2


def test_memory_can_be_given_back_anywhere():
    return_free_memory()
