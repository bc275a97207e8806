"""The peers' own environments: made once, never mixed with the project's."""

import subprocess
import sys
from pathlib import Path

from benchmarks.places import ROOT
from benchmarks.quantization.places import peer_folder

TORCH = "torch==2.13.0"
# gptqmodel pins a newer torch than it needs: without its dependencies, and those that it imports.
STEPS: dict[str, list[list[str]]] = {
    "gptqmodel": [
        [TORCH],
        ["transformers", "accelerate", "datasets", "optimum", "threadpoolctl", "safetensors"],
        ["numpy", "gguf", "pyarrow", "pillow"],
        ["--no-deps", "gptqmodel==7.7.0", "pypcre==0.6.4", "tokenicer==0.0.14", "logbar==0.4.15"],
        ["--no-deps", "device-smi==0.5.7", "defuser==0.0.28"],
    ],
    "llmcompressor": [
        [TORCH],
        [TORCH, "llmcompressor==0.14.0.1", "bitsandbytes==0.50.2"],
    ],
}
SHARED = {"bitsandbytes": "llmcompressor"}
# llm-compressor pins an older transformers than the project's.
UNCONSTRAINED = ("llmcompressor",)


def peer_python(method: str) -> Path:
    """Return the Python of a peer's environment, made if it is absent."""
    name = SHARED.get(method, method)
    folder = peer_folder(name)
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists():
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for step in STEPS[name]:
            rules = [] if name in UNCONSTRAINED else ["--constraint", str(ROOT / "constraints.txt")]
            install = [str(python), "-m", "pip", "install", "--quiet", *rules, *step]
            subprocess.run(install, check=True)
        stamp.touch()
    return python


if __name__ == "__main__":
    for each in STEPS:
        print(peer_python(each))
