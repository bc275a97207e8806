"""A tiny model that only Python code of its own can load."""

import json
from pathlib import Path

from stillroom.models import save_model
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "{kind}"
"""
MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **named):
        result = super().forward(*arguments, **named)
        result.logits = result.logits / 2
        return result
"""


def write_own_model(folder: Path, kind: str = "own") -> None:
    """Write a Llama whose logits its own code halves; transformers knows the kind llama."""
    save_model(tiny_llama(seed=1, layers=4, hidden=64), tiny_tokenizer(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": kind,
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(kind=kind))
    (folder / "modeling_own.py").write_text(MODELING)
