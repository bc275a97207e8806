"""Read a GPTQ checkpoint folder: ours, or one that another quantizer wrote."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import write_weight
from stillroom.errors import CorruptedError, SourceError
from stillroom.models import Task, Weights, model_class, quiet, read_config
from stillroom.quantization.linear import QuantizedLinear
from stillroom.quantization.packing import PARTS, CheckpointFormat, PackedWeight


def load_quantized(
    folder: Path,
    *,
    task: Task = "causal_lm",
    dtype: torch.dtype = torch.float32,
    weights: Weights = "dense",
) -> PreTrainedModel:
    """Return the model of a GPTQ checkpoint, in evaluation mode.

    "packed" keeps the integers and dequantizes a layer when it is used; "dense" dequantizes all
    layers once. `dtype` is that of everything that is not packed.

    Raises:
        SourceError: the folder holds no GPTQ checkpoint.
        CorruptedError: tensors of the model are missing.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    section = read_config(folder).get("quantization_config", {})
    bits, checkpoint_format = _read_section(section, folder)
    config = AutoConfig.from_pretrained(str(folder))
    del config.quantization_config
    with quiet(), no_init_weights():
        model: PreTrainedModel = model_class(task).from_config(config, dtype=dtype)
    model.tie_weights()
    state = _read_tensors(folder)
    names = [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]
    for name in names:
        missing = [part for part in PARTS if f"{name}.{part}" not in state]
        if missing:
            raise CorruptedError(f"{folder}: {name} lacks {', '.join(missing)}; write it again")
        packed = PackedWeight(*(state.pop(f"{name}.{part}") for part in PARTS))
        layer = QuantizedLinear(packed, None, bits, checkpoint_format)
        _place(model, name, layer, state, dtype, weights)
    dense = {f"{name}.weight" for name in names}
    _load_rest(model, state, dense, folder)
    model.train(False)
    return model


def _read_section(section: dict[str, Any], folder: Path) -> tuple[int, CheckpointFormat]:
    checkpoint_format = section.get("checkpoint_format", section.get("format", "gptq"))
    known: tuple[str, ...] = get_args(CheckpointFormat)
    if section.get("quant_method") != "gptq" or checkpoint_format not in known:
        raise SourceError(
            f"{folder}: expected a GPTQ checkpoint of format {' or '.join(known)}, got "
            f"{section.get('quant_method')} of format {checkpoint_format}; requantize the model"
        )
    return int(section["bits"]), checkpoint_format


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            state |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptedError(f"{path} cannot be read: {error}; write it again") from error
    if not state:
        raise SourceError(f"{folder} holds no weights: expected model.safetensors")
    return state


def _place(
    model: nn.Module,
    name: str,
    layer: QuantizedLinear,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    weights: Weights,
) -> None:
    """Put a layer where the model has its dense one, packed or dequantized."""
    if weights == "dense":
        write_weight(model.get_submodule(name), layer.dequantize())
        return
    bias = state.pop(f"{name}.bias", None)
    layer.bias = None if bias is None else bias.to(dtype)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _load_rest(model: nn.Module, state: dict[str, Tensor], placed: set[str], folder: Path) -> None:
    """Copy the tensors that were not packed, and make sure that none is missing."""
    own = model.state_dict()
    # Tied tensors are stored once: what shares memory with a tensor that came is there.
    present = {own[key].data_ptr() for key in own if key in state or key in placed}
    missing = []
    for key, tensor in own.items():
        owner, _, last = key.rpartition(".")
        packed = f"{owner}.weight" in placed and f"{owner}.weight" not in own and last != "weight"
        if key in state:
            tensor.copy_(state[key])
        elif not packed and tensor.data_ptr() not in present:
            missing.append(key)
    unknown = sorted(state.keys() - own.keys())
    if unknown or missing:
        raise CorruptedError(
            f"{folder}: the tensors do not fit config.json; missing {missing[:3]}, "
            f"unknown {unknown[:3]}; write the checkpoint again"
        )
