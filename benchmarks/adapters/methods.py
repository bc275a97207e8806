"""The methods that are compared, each with its learning rate (chosen after rates.py)."""

from dataclasses import dataclass

from stillroom.adapters.options import (
    AdapterOptions,
    BitFitOptions,
    BottleneckOptions,
    FullOptions,
    LoraOptions,
    PrefixOptions,
    PromptOptions,
    PTuningOptions,
    TopLayersOptions,
)


@dataclass(frozen=True)
class Method:
    """A row of the table: what is put on the base, and how fast it learns."""

    name: str
    options: AdapterOptions
    learning_rate: float


FULL = Method("full fine-tuning", FullOptions(), 1e-4)
HOULSBY = Method("Houlsby, width 16", BottleneckOptions(width=16), 3e-3)
LORA = Method("LoRA, rank 4", LoraOptions(rank=4, alpha=8.0), 2e-3)
PREFIX = Method("prefix tuning, 5 tokens", PrefixOptions(5, encoder_width=128), 1e-3)
DEEP_PROMPT = Method("P-tuning v2, 5 tokens", PrefixOptions(5), 3e-2)
PROMPT = Method("prompt tuning, 8 tokens", PromptOptions(8), 3e-2)
P_TUNING = Method("P-tuning, LSTM, 8 tokens", PTuningOptions(((1, 4), (-1, 4))), 1e-2)
BITFIT = Method("BitFit", BitFitOptions(), 3e-3)
TOP_LAYERS = {
    1: Method("top 1 of 6 layers", TopLayersOptions(1), 1e-3),
    4: Method("top 4 of 6 layers", TopLayersOptions(4), 3e-4),
}

METHODS = (
    FULL,
    HOULSBY,
    LORA,
    PREFIX,
    DEEP_PROMPT,
    PROMPT,
    P_TUNING,
    BITFIT,
    *TOP_LAYERS.values(),
)
