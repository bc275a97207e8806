"""The machine that a measurement of speed was made on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name as the operating system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def threads_here() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware_name(threads: int) -> str:
    """Return the processor's name and how many threads work on it, such as "EPYC, 2 threads"."""
    return f"{processor()}, {threads} threads"


def gpu_names(driver: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Return the names of this machine's GPUs as NVIDIA's driver says them, each once.

    Without torch, which takes seconds to import. "a GPU" where the driver does not say.
    """
    said = {
        line.partition(":")[2].strip()
        for file in driver.glob("*/information")
        for line in file.read_text().splitlines()
        if line.startswith("Model:")
    }
    return ", ".join(sorted(said)) or "a GPU"
