"""Which processes are stages: forked ones, and on a machine with a GPU those that began anew."""

import psutil


def is_stage(process: psutil.Process) -> bool:
    """Return whether a living process does the work of a stage."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.name() == "stage" or "tasks.child" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def is_fork_server(process: psutil.Process) -> bool:
    """Return whether a living process is what stages are forked from."""
    try:
        return "tasks.fork_server" in process.cmdline() and process.name() != "stage"
    except psutil.NoSuchProcess:
        return False
