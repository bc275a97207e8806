"""The key of an artifact: what it is made from, and nothing else."""

import hashlib
import importlib.metadata
import json
from functools import cache
from typing import Any

# Changed when the layout of keys changes, so that no old artifact is taken for a new one.
LAYOUT = 1


def artifact_key(
    stage: str, version: int, section: dict[str, Any], seed: int, inputs: dict[str, str]
) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, of everything the artifact depends on.

    Args:
        stage: name of the stage.
        version: the stage's version; it rises when the stage makes something else of the same.
        section: the parts of the recipe that the stage reads, as JSON.
        seed: the recipe's seed.
        inputs: role to key (or to the identity of a resolved source).
    """
    everything = {
        "layout": LAYOUT,
        "stage": stage,
        "version": version,
        "section": section,
        "seed": seed,
        "numerics": numerics(),
        "inputs": inputs,
    }
    return hashlib.sha256(canonical(everything)).hexdigest()


def canonical(value: object) -> bytes:
    """Return JSON with sorted keys and no spaces: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def numerics() -> dict[str, str]:
    """Return the minor versions of what changes the bytes of a result."""
    return {name: minor_version(name) for name in ("torch", "transformers")}


@cache
def minor_version(package: str) -> str:
    """Return the major and minor number of an installed package."""
    return ".".join(importlib.metadata.version(package).split(".")[:2])
