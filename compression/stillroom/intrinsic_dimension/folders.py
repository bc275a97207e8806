"""How the folder of a trained subspace is told from those of other adapters."""

import json
from pathlib import Path

CONFIG = "adapter_config.json"
METHOD = "subspace"


def is_subspace(folder: Path) -> bool:
    """Return whether `folder` holds a trained subspace."""
    try:
        method = json.loads((folder / CONFIG).read_text()).get("method")
    except FileNotFoundError:
        return False
    return bool(method == METHOD)
