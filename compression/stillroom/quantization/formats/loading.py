"""Read a GPTQ checkpoint folder: ours, or one that another quantizer wrote."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.blocks import LinearWeight
from stillroom.errors import CorruptedError
from stillroom.models import Task, Weights, load_config, new_model, quiet
from stillroom.quantization.formats.experts import Parts, parameter_of, plain_experts
from stillroom.quantization.formats.folder import open_quantized
from stillroom.quantization.formats.places import fill, place_of, require_shape
from stillroom.quantization.linear import QuantizedLinear


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
        CorruptedError: tensors of the model are missing, or of other shapes than config.json says.
        MismatchError: packed words are not of 32 bits.
    """
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    quantized = open_quantized(folder)
    config = load_config(folder)
    del config.quantization_config
    with quiet(), no_init_weights():
        model: PreTrainedModel = new_model(folder, config, task=task, dtype=dtype)
    model.tie_weights()
    state = {name: quantized.files[name] for name in quantized.plain}
    experts = plain_experts(model, state)
    names = (*experts.values(), *quantized.layers)
    found = {name: place_of(model, name, folder) for name in names}
    # Of a mixture of which some experts are packed: what comes by itself goes over it.
    fused = {parameter_of(name, weight) for name, weight in found.items()} & state.keys()
    for key in fused:
        fill(model.state_dict()[key], state.pop(key), key, folder)
    parts = Parts()
    for name, weight in found.items():
        parts.add(name, weight)
    for key, name in experts.items():
        fill(found[name].read(), state.pop(key), key, folder)
    for name in quantized.layers:
        packed, bits = quantized.packed(name)
        require_shape(packed.shape, found[name].shape, name, folder)
        layer = QuantizedLinear(packed, None, bits, quantized.checkpoint_format)
        _place(model, name, found[name], layer, state, dtype, weights)
    lacking = [name for name in parts.lacking if name not in fused]
    _load_rest(model, state, parts.parameters, lacking, folder)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.train(False)
    return model


def _place(
    model: PreTrainedModel,
    name: str,
    weight: LinearWeight,
    layer: QuantizedLinear,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    weights: Weights,
) -> None:
    """Put a layer where the model has its dense one."""
    # An expert is a slice of a parameter, where no layer of its own has room; rows of embeddings
    # are looked up, not multiplied.
    if (
        weights == "dense"
        or weight.expert is not None
        or isinstance(weight.module, nn.Embedding)
        or weight.module is model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ):
        weight.write(layer.dequantize())
        bias = state.get(f"{name}.bias")
        if bias is not None and getattr(weight.module, "bias", None) is None and not bias.any():
            del state[f"{name}.bias"]  # auto-gptq gives every layer a bias, of zeros
        return
    bias = state.pop(f"{name}.bias", None)
    layer.bias = None if bias is None else bias.to(dtype)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _load_rest(
    model: nn.Module, state: dict[str, Tensor], placed: set[str], missing: list[str], folder: Path
) -> None:
    """Copy the tensors that were not packed, and make sure that none is missing."""
    own = model.state_dict()
    # Tied tensors are stored once: what shares memory with a tensor that came is there.
    present = {own[key].data_ptr() for key in own if key in state or key in placed}
    for key, tensor in own.items():
        owner, _, last = key.rpartition(".")
        packed = f"{owner}.weight" in placed and f"{owner}.weight" not in own and last != "weight"
        if key in state:
            fill(tensor, state[key], key, folder)
        elif not packed and tensor.data_ptr() not in present:
            missing.append(key)
    unknown = sorted(state.keys() - own.keys())
    if unknown or missing:
        raise CorruptedError(
            f"{folder}: the tensors do not fit config.json; missing {missing[:3]}, "
            f"unknown {unknown[:3]}; write the checkpoint again"
        )
