"""Which processes are stages: forked ones, and on a machine with a GPU those that began anew."""

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a living process; of one that has ended, nothing."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie, too
        return []


def is_stage(process: psutil.Process) -> bool:
    """Return whether a living process does the work of a stage."""
    return bool(command := command_of(process)) and (
        _is_named(process, "stage") or "tasks.child" in command
    )


def is_fork_server(process: psutil.Process) -> bool:
    """Return whether a living process is what stages are forked from."""
    return "tasks.fork_server" in command_of(process) and not _is_named(process, "stage")


def _is_named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name() == name
    except psutil.NoSuchProcess:
        return False
