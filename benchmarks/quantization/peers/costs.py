"""What a quantizer's process spends; imports nothing, so that every environment can use it."""

import os
import resource
import time


class Costs:
    """CPU seconds, wall seconds and peak memory of this process and its children."""

    def __init__(self) -> None:
        self.load_average = os.getloadavg()[0]
        self.started = (time.monotonic(), cpu_seconds())
        self.imported = self.started
        self.ended = self.started
        self.peak = 0

    def loaded(self) -> None:
        """Note that the imports are done: the work begins."""
        self.imported = (time.monotonic(), cpu_seconds())

    def finished(self) -> None:
        """Note that the quantized checkpoint is written."""
        self.ended = (time.monotonic(), cpu_seconds())
        self.peak = peak_bytes()

    def report(self) -> dict[str, float]:
        """Return seconds from `loaded` to `finished`, and the peak up to then in bytes."""
        return {
            "import_cpu_seconds": self.imported[1] - self.started[1],
            "cpu_seconds": self.ended[1] - self.imported[1],
            "wall_seconds": self.ended[0] - self.imported[0],
            "peak_bytes": self.peak,
            "load_average": self.load_average,
        }


def cpu_seconds() -> float:
    """Return user and system seconds of this process and of its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had since it was started.

    The kernel's own ru_maxrss counts what the process was forked from, too.
    """
    with open("/proc/self/status") as status:
        line = next(each for each in status if each.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
