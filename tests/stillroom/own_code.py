"""A tiny model that only Python code of its own can load."""

import json
from pathlib import Path

from stillroom.models import save_model
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
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


def write_own_model(folder: Path, layers: int = 4, hidden: int = 64) -> None:
    """Write a Llama whose logits its own code halves."""
    save_model(tiny_llama(seed=1, layers=layers, hidden=hidden), tiny_tokenizer(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
