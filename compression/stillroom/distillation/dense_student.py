"""Make a dense student of a mixture-of-experts teacher.

Fedus et al. 2021 (Switch Transformers, section 4.2) start the dense student with the teacher's
non-expert weights; here its feed-forward layers start from the experts too.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from stillroom.data.examples import Examples
from stillroom.distillation.construction import construct
from stillroom.errors import DataError, RecipeError

Experts = Literal["mean", "most_used"]
FIELD = "distillation.student.experts"
SUPPORTED = (
    "SwitchTransformersForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)


def is_mixture(model: nn.Module) -> bool:
    """Return whether any part of the module tree is a set of experts."""
    return any(_is_experts(name, module) for name, module in model.named_modules())


def dense_student(
    teacher: PreTrainedModel,
    experts: Experts,
    rows: Examples | None = None,
    *,
    batch_rows: int = 4,
) -> PreTrainedModel:
    """Return a dense model: the teacher's non-expert weights, and one expert's place filled.

    A Switch Transformer becomes a T5, Mixtral a Mistral, Qwen3-MoE a Qwen3. "mean": each matrix is
    the mean over the experts, taken in float32. "most_used": the expert that the layer's router
    chose for most tokens of `rows`, the lowest number among equals. Routers are left out, and
    nothing is copied of experts that are thrown away. The result shares no memory with the teacher.

    What the student's feed-forward layers return is not scaled by the router. With Mixtral, and
    Qwen3-MoE with `norm_topk_prob`, the chosen experts' weights add up to 1, so a mixture of equal
    experts is its dense student. Without `norm_topk_prob`, and with Switch, the teacher multiplies
    by the chosen experts' probabilities p, which add up to less than 1, and by 0 the tokens beyond
    a Switch expert's capacity: there the student's layers start larger than the teacher's, by 1/p.
    The mean of experts whose neurons are not alike is small, by about the root of their number.

    Raises:
        RecipeError: the teacher is no mixture, has no dense counterpart, or its dense and sparse
            layers differ in width.
        DataError: "most_used", and no rows to count on.
    """
    kind, config = _dense_kind(teacher)
    chosen: dict[str, int] = {}
    if experts == "most_used":
        if rows is None or len(rows) == 0:
            raise DataError(
                f"{FIELD}: most_used counts the router's choices on calibration rows, and there "
                "are none; set data.calibration_rows to 1 or more, or use mean"
            )
        counts = count_choices(teacher, rows, batch_rows)
        # argmax gives the first of equals.
        chosen = {name: int(count.argmax()) for name, count in counts.items()}
    layers = _sparse_layers(teacher)
    state = teacher.state_dict()

    def value(name: str) -> Tensor:
        name = name.replace(".DenseReluDense.", ".mlp.")  # T5's name of it
        prefix, _, parameter = name.partition(".mlp.")
        layer = layers.get(f"{prefix}.mlp")
        if layer is None:
            return cast(Tensor, state[name])
        matrices = _matrices(layer.experts, parameter)
        if experts == "mean":
            return _mean(matrices)
        return matrices[chosen[f"{prefix}.mlp"]]

    return construct(kind, config, value, teacher)


@torch.no_grad()
def count_choices(
    teacher: PreTrainedModel, rows: Examples, batch_rows: int = 4
) -> dict[str, Tensor]:
    """Return how often each router chose each expert, (experts,) int64 by the layer's dotted name.

    Padding is not counted, a Switch router's choice beyond an expert's capacity is. An encoder and
    its decoder both read the rows.

    Raises:
        RecipeError: the teacher is no mixture, or none whose routers are known.
    """
    _dense_kind(teacher)
    counts: dict[str, Tensor] = {}
    mask = torch.ones(0)

    def count(name: str, router: Any, output: tuple[Tensor, ...]) -> None:
        if type(router).__name__ == "SwitchTransformersTop1Router":
            choices = output[2].argmax(dim=-1)[mask]  # of logits (rows, length, experts)
        else:
            choices = output[2][mask.flatten()]  # of indices (rows · length, top k)
        found = torch.bincount(choices.flatten(), minlength=router.num_experts)
        counts[name] = counts.get(name, 0) + found.cpu()

    hooks = [
        _router(layer).register_forward_hook(
            lambda router, _, output, name=name: count(name, router, output)
        )
        for name, layer in _sparse_layers(teacher).items()
    ]
    training = teacher.training
    teacher.train(False)
    try:
        for start in range(0, len(rows), batch_rows):
            part = rows.take(slice(start, start + batch_rows))
            ids, ones = part.input_ids.to(teacher.device), part.attention_mask.to(teacher.device)
            mask = ones.bool()
            more = {}
            if teacher.config.is_encoder_decoder:
                more = {"decoder_input_ids": ids, "decoder_attention_mask": ones}
            teacher(input_ids=ids, attention_mask=ones, use_cache=False, **more)
    finally:
        teacher.train(training)
        for hook in hooks:
            hook.remove()
    return counts


def _is_experts(name: str, module: nn.Module) -> bool:
    named = name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
    # transformers marks the modules whose parameters are stacked experts.
    return named or hasattr(module, "is_transposed")


def _sparse_layers(teacher: PreTrainedModel) -> dict[str, Any]:
    """Return the feed-forward layers that hold experts, by dotted name."""
    return {
        name: module
        for name, module in teacher.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    }


def _router(layer: Any) -> nn.Module:
    return cast(nn.Module, layer.router if hasattr(layer, "router") else layer.gate)


def _matrices(experts: nn.Module, parameter: str) -> list[Tensor]:
    """Return the matrix of each expert that stands at `parameter` in a dense layer, (out, in)."""
    if isinstance(experts, nn.ModuleDict):  # Switch
        return [expert.get_parameter(parameter).detach() for expert in experts.values()]
    name = parameter.removesuffix(".weight")
    if name == "down_proj":
        return list(experts.get_parameter(name).detach())  # of (experts, hidden, width)
    stacked = experts.get_parameter("gate_up_proj").detach()  # (experts, 2 · width, hidden)
    gate, up = stacked.chunk(2, dim=1)
    return list(gate if name == "gate_proj" else up)


def _mean(matrices: list[Tensor]) -> Tensor:
    # One at a time: the experts together, in float32, may not fit in memory.
    total = torch.zeros_like(matrices[0], dtype=torch.float32)
    for matrix in matrices:
        total += matrix
    return (total / len(matrices)).to(matrices[0].dtype)


def _dense_kind(teacher: PreTrainedModel) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class and the config of the dense model."""
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    name, config = type(teacher).__name__, teacher.config
    if not is_mixture(teacher):
        raise RecipeError(
            f"{FIELD}: a mixture-of-experts teacher expected, {name} came, which has no experts; "
            "leave it out"
        )
    match name:
        case "SwitchTransformersForConditionalGeneration":
            if not config.tie_word_embeddings:
                raise RecipeError(
                    f"{FIELD}: this {name} has a head of its own, and a T5's head is always its "
                    "embedding; tie the teacher's, or take another"
                )
            changes = {"feed_forward_proj": config.dense_act_fn}
            return T5ForConditionalGeneration, _converted(config, T5Config, changes)
        case "MixtralForCausalLM":
            return MistralForCausalLM, _converted(config, MistralConfig, {})
        case "Qwen3MoeForCausalLM":
            changes = {"intermediate_size": _common_width(teacher)}
            if config.sliding_window is not None:
                # Qwen3-MoE's window holds in every layer, Qwen3's where the list says so.
                changes["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
            return Qwen3ForCausalLM, _converted(config, Qwen3Config, changes)
        case _:
            raise RecipeError(
                f"{FIELD}: no dense counterpart of {name} is known, those of "
                f"{', '.join(SUPPORTED)} are; leave it out to keep the experts, or take another "
                "teacher"
            )


def _common_width(teacher: PreTrainedModel) -> int:
    sparse = teacher.config.moe_intermediate_size
    dense = {
        module.out_features
        for name, module in teacher.named_modules()
        if name.endswith(".gate_proj") and isinstance(module, nn.Linear)
    } - {sparse}
    if dense:
        raise RecipeError(
            f"{FIELD}: all feed-forward layers of one width expected, and the teacher's experts "
            f"are {sparse} wide (moe_intermediate_size), its dense layers {dense.pop()} "
            "(intermediate_size); take a teacher without such layers, or leave it out"
        )
    return int(sparse)


def _converted(
    config: PreTrainedConfig, kind: type[PreTrainedConfig], changes: dict[str, Any]
) -> PreTrainedConfig:
    """Return a config of `kind` with all that `config` says but what only its own kind knows."""
    own = set(type(config)().to_dict()) - set(kind().to_dict())
    drop = own | {"model_type", "architectures", "transformers_version", "_name_or_path"}
    values = {name: value for name, value in config.to_dict().items() if name not in drop}
    return kind(**values | changes)
