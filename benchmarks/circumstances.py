"""When, where and with what a benchmark was run."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from benchmarks.places import ROOT


def circumstances(benchmark: str) -> dict[str, Any]:
    """Return the head of a results.json: benchmark, date, commit, hardware and versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    ).stdout.strip()
    return {
        "benchmark": benchmark,
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


def circumstances_line(results: dict[str, Any]) -> str:
    """Return what `circumstances` found, as one sentence of a page."""
    hardware, versions = results["hardware"], results["versions"]
    return (
        f"{results['date']}, gathered at commit {results['commit']} from rows and "
        f"measurements that are kept until their files are deleted; {hardware['processor']}, "
        f"{hardware['cores']} cores; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; text {results['text']}; "
        f"{'the long version' if results['full'] else 'the short version'}."
    )


def _processor(fact: str) -> str:
    """Return a line of Linux's description of the first processor."""
    try:
        with open("/proc/cpuinfo") as file:
            found = [line.partition(":")[2].strip() for line in file if line.startswith(fact)]
    except OSError:
        found = []
    return found[0] if found else platform.processor()
