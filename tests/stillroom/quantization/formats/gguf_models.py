"""Tiny checkpoints of every architecture that has a GGUF, with grids of a test's choice."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from stillroom.models import save_model
from stillroom.quantization.packing import pack
from stillroom.quantization.weight import QuantizedWeight

VOCABULARY = 288
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
OWN = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_inner": 128, "activation_function": "gelu_new"},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {"rotary_pct": 0.5},
    "bloom": {"intermediate_size": 256},
}


def tiny_model(kind: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """Return a model with untied embeddings whose outputs differ by position."""
    own = OWN[kind] | more
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **(ids | WIDTHS | own))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
                elif "norm" not in name and ".ln_" not in name:
                    parameter.normal_(0, 0.05)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return BPE on bytes: 4 special tokens, 256 bytes, and some merges of letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("1", "2"), ("Ġ", "1"), ("l", "l")]
    words += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{{ messages[0]['content'] }}",
    )


def rounded(weight: Tensor, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Return a weight (out, in) rounded to nearest between each group's extremes."""
    levels = 2**bits - 1
    groups = weight.unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    if symmetric:
        half = 2 ** (bits - 1)
        scales = (groups.abs().amax(-1) / (half - 1)).half()
        zeros = torch.full_like(scales, half, dtype=torch.uint8)
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / levels).half()
        zeros = (-low / scales.float()).round().clamp(1, levels).to(torch.uint8)
    integers = (groups / scales.float()[..., None]).round() + zeros[..., None]
    integers = integers.clamp(0, levels).to(torch.uint8).flatten(1)
    return QuantizedWeight(integers, scales, zeros, bits)


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    bits: int = 4,
    group_size: int = 32,
    *,
    symmetric: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Write a GPTQ checkpoint whose every linear in the blocks is rounded, in `model` too."""
    from safetensors.torch import load_file, save_file

    save_model(model, tokenizer or byte_tokenizer(), folder)
    state = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or "lm_head" in name or "embed_out" in name:
            continue
        transposed = isinstance(module, Conv1D)
        matrix = state.pop(f"{name}.weight")
        weight = rounded(matrix.T if transposed else matrix, bits, group_size, symmetric=symmetric)
        state |= {f"{name}.{part}": tensor for part, tensor in pack(weight).tensors().items()}
        values = weight.dequantize()
        module.weight.data.copy_(values.T if transposed else values)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits,
        "group_size": group_size, "sym": symmetric, "desc_act": False,
    }  # fmt: skip
    path.write_text(json.dumps(config))
