"""What `model_config` of a registered version may say, and which engine it comes to."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from stillroom.contents import Contents
from stillroom.errors import MismatchError, RecipeError
from stillroom.llama_engine import GGUF_FILE, has_llama_cpp, read_further_rules

DEFAULT_CONFIG: dict[str, Any] = {
    "weights": "auto",
    "dtype": "float32",
    "device": "cpu",
    "engine": "auto",
    "trust_remote_code": False,
}
CHOICES = {
    "engine": ("auto", "torch", "llama.cpp"),
    "weights": ("auto", "packed", "dense"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
}
Engine = Literal["torch", "llama.cpp"]
logger = logging.getLogger(__name__)


def trusts_code(config: Mapping[str, Any]) -> bool:
    """Return whether Python code that a version brings along may run.

    Raises:
        RecipeError: `config` says neither yes nor no.
    """
    trusted = config["trust_remote_code"]
    if not isinstance(trusted, bool):
        raise RecipeError(
            f"model_config: expected trust_remote_code true or false; {trusted!r} came"
        )
    return trusted


def choose_engine(config: Mapping[str, Any], folder: Path, contents: Contents) -> Engine:
    """Return what runs a version's model: the engine that `config` asks for, or the faster one.

    Raises:
        RecipeError: `config` names no engine, weights or dtype that there are.
        MismatchError: it asks for llama.cpp, which cannot run this version here, or not so.
    """
    for name, known in CHOICES.items():
        if config[name] not in known:
            raise RecipeError(
                f"model_config: expected {name} {', '.join(known[:-1])} or {known[-1]}; "
                f"{config[name]} came; leave it out for {DEFAULT_CONFIG[name]}"
            )
    wanted = config["engine"]
    if wanted == "torch":
        return "torch"
    obstacle = _obstacle(config, folder, contents)
    if obstacle is None:
        return "llama.cpp"
    if wanted == "llama.cpp":
        raise MismatchError(
            f"model_config: engine llama.cpp needs a causal LM with a GGUF export, and llama.cpp; "
            f"{obstacle}; leave engine out to decode with torch"
        )
    if (folder / GGUF_FILE).exists():
        logger.warning("torch decodes, though the version holds a GGUF export: %s", obstacle)
    return "torch"


def _obstacle(config: Mapping[str, Any], folder: Path, contents: Contents) -> str | None:
    """Return why llama.cpp cannot run a version here."""
    if contents.task != "causal_lm":
        return f"this version is for {contents.task}"
    if contents.base is not None:
        return "this version is an adapter"
    if not (folder / GGUF_FILE).exists():
        return f"this version holds no {GGUF_FILE}: register one made with quantization.gguf: true"
    if wish := _wish(config, folder):
        return wish
    if not has_llama_cpp():
        return "llama-cpp-python is not installed: pip install llama-cpp-python"
    return None


def _wish(config: Mapping[str, Any], folder: Path) -> str | None:
    """Return what `config` or the model asks for that an export does not do."""
    if config["device"] != "cpu":
        return f"device is {config['device']}, and exports are run on the CPU"
    for name in ("weights", "dtype"):
        if config[name] != DEFAULT_CONFIG[name]:
            return f"{name} is {config[name]}, and an export has its own"
    if rules := read_further_rules(folder):
        return f"generation_config.json sets {', '.join(rules)}, which only torch follows here"
    return None
