"""Small operations on one thread: a second one costs more than it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations on the calling thread alone.

    For thousands of operations on a few kilobytes each, waking the others and waiting for them
    takes longer than the work, and they burn processor time between two calls.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
