"""When, where and with what a benchmark was run."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from benchmarks.places import ROOT


def circumstances() -> dict[str, Any]:
    """Return what stands beside a measurement: date, commit, hardware and versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "full": os.environ.get("FULL") == "1",
        "hardware": {
            "processor": _processor("model name"),
            "cores": os.cpu_count(),
            # A peer that computes in bfloat16 is fast only where the processor does.
            "bfloat16": "avx512_bf16" in _processor("flags"),
        },
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
    }


def circumstances_line(found: dict[str, Any], text: str) -> str:
    """Return what `circumstances` found, and the text that was measured on, as one line."""
    hardware, versions = found["hardware"], found["versions"]
    return (
        f"Measured {found['date']} at commit {found['commit']}: {hardware['processor']}, "
        f"{hardware['cores']} cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; text: {text}; "
        f"{'the long version' if found['full'] else 'the short version'}."
    )


def _processor(fact: str) -> str:
    """Return a line of Linux's description of the first processor."""
    try:
        with open("/proc/cpuinfo") as file:
            found = [line.partition(":")[2].strip() for line in file if line.startswith(fact)]
    except OSError:
        found = []
    return found[0] if found else platform.processor()
