"""The same model with more or fewer blocks."""

import json
import shutil
from pathlib import Path


def write_other_depth(whole: Path, blocks: int, folder: Path) -> None:
    """Write the Llama in `whole` with its first blocks, or with all of them over and over."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    own_blocks = config["num_hidden_layers"]
    config["num_hidden_layers"] = blocks
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][i % own_blocks] for i in range(blocks)]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    state = load_file(folder / "model.safetensors")
    prefix = "model.layers."
    chosen = {name: each for name, each in state.items() if not name.startswith(prefix)}
    for index in range(blocks):
        own = f"{prefix}{index % own_blocks}."
        for name, each in state.items():
            if name.startswith(own):
                chosen[f"{prefix}{index}.{name.removeprefix(own)}"] = each.clone()
    save_file(chosen, folder / "model.safetensors", metadata={"format": "pt"})
