"""Make a dense student of a mixture of experts: its own weights, and one FFN for its experts.

Switch (Fedus et al. 2021, section 4.2) starts a dense student from the non-expert weights of its
sparse teacher. Here the student's feed-forward layers start too: as the mean of the experts, or as
the one that the router chose most often.

Where the router's weights of a token add up to 1 (Mixtral, Qwen3-MoE with norm_topk_prob), experts
that are all the same give exactly their dense student. Elsewhere (Switch, Qwen3-MoE without it) the
mixture's output is the expert's times the router's probability, which the student learns to do
without.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.data.examples import Examples
from stillroom.errors import RecipeError

Experts = Literal["mean", "most_used"]
State = dict[str, Tensor]
# Of its mixtures a model's file holds the router, and the experts as stacks or one by one.
STACKED = re.compile(r"(?P<layer>.*\.mlp)\.experts\.(?P<part>gate_up_proj|down_proj)")
SINGLE = re.compile(r"(?P<layer>.*\.mlp)\.experts\.expert_(?P<expert>\d+)\.(?P<part>w[io])\.weight")
ROUTER = re.compile(r".*\.mlp\.(gate\.weight|router\.classifier\.(weight|bias))")


def dense_student(
    teacher: PreTrainedModel, experts: Experts = "mean", counts: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """Return a dense model with the teacher's weights, and one expert where it has several.

    A Mixtral gives a Mistral, a Qwen3-MoE a Qwen3, a Switch a T5. It shares no memory with the
    teacher.

    Args:
        teacher: the mixture.
        experts: "mean" of all, or the "most_used" of each layer (of equals the first).
        counts: what `count_choices` found, for "most_used".

    Raises:
        RecipeError: the mixture has no dense counterpart here, or its dense layers are of another
            width than its experts; "most_used" without counts.
    """
    if experts == "most_used" and counts is None:
        raise RecipeError(
            "student.experts: most_used needs the router's choices: count them on some text first"
        )
    student = _empty_counterpart(teacher)
    chosen = {name: int(each.argmax()) for name, each in (counts or {}).items()}
    state = _dense_state(teacher.state_dict(), chosen if experts == "most_used" else None)
    if type(student).__name__.startswith("T5"):
        state = {name.replace(".mlp.", ".DenseReluDense."): each for name, each in state.items()}
    _check_shapes(state, student.state_dict())
    copies = {each.data_ptr(): each.detach().clone() for each in state.values()}
    student.load_state_dict(
        {name: copies[each.data_ptr()] for name, each in state.items()}, assign=True
    )
    student.tie_weights()
    student.requires_grad_(True).train(False)
    return student


def mixture_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the router of each mixture layer, by the dotted name of the layer."""
    return {
        name: getattr(module, "gate", None) or module.router
        for name, module in model.named_modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
    }


@torch.no_grad()
def count_choices(
    teacher: PreTrainedModel, rows: Examples, batch_rows: int = 4
) -> dict[str, Tensor]:
    """Return how often each expert was chosen for a real token, (experts,), by mixture layer.

    The decoder of an encoder-decoder is given the same text as its encoder.
    """
    routers = mixture_layers(teacher)
    counts = {name: torch.zeros(_experts(router)) for name, router in routers.items()}
    mask = rows.attention_mask[:batch_rows]

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            # Switch: one-hot (rows, length, experts) first; others: indices (tokens, chosen) last.
            first, *_rest, last = output
            one_hot = first if first.dim() == 3 else nn.functional.one_hot(last, len(counts[name]))
            chosen = one_hot.reshape(mask.numel(), -1, len(counts[name])).sum(1)
            counts[name] += (chosen * mask.reshape(-1, 1)).sum(0).cpu()

        return hook

    hooks = [router.register_forward_hook(watch(name)) for name, router in routers.items()]
    before = teacher.training
    try:
        teacher.train(False)
        for start in range(0, len(rows), batch_rows):
            part = rows.take(slice(start, start + batch_rows))
            mask = part.attention_mask.to(teacher.device)
            ids = part.input_ids.to(teacher.device)
            decoder = {"decoder_input_ids": ids} if teacher.config.is_encoder_decoder else {}
            teacher(input_ids=ids, attention_mask=mask, use_cache=False, **decoder)
    finally:
        teacher.train(before)
        for hook in hooks:
            hook.remove()
    return counts


def _experts(router: nn.Module) -> int:
    return int(router.num_experts)  # type: ignore[arg-type]


def _empty_counterpart(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model of the teacher's shape, without values in its parameters."""
    from accelerate import init_empty_weights
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    entries = teacher.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        entries.pop(name, None)
    match type(teacher).__name__:
        case "MixtralForCausalLM":
            kind: Any = MistralForCausalLM
            config: Any = MistralConfig(**_known(MistralConfig, entries))
        case "Qwen3MoeForCausalLM":
            kind = Qwen3ForCausalLM
            entries["intermediate_size"] = entries["moe_intermediate_size"]
            config = Qwen3Config(**_known(Qwen3Config, entries))
        case "SwitchTransformersForConditionalGeneration":
            kind = T5ForConditionalGeneration
            entries["feed_forward_proj"] = entries["dense_act_fn"]
            config = T5Config(**_known(T5Config, entries))
        case other:
            raise RecipeError(
                f"student.experts: expected a Switch, Mixtral or Qwen3-MoE teacher, {other} came, "
                "which has no dense counterpart here; leave it out to keep the mixture"
            )
    with init_empty_weights(include_buffers=False):
        student: PreTrainedModel = kind(config)
    return student


def _known(config: type, entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that the dense model's config has too."""
    defaults = config().to_dict()
    return {name: each for name, each in entries.items() if name in defaults}


def _dense_state(state: State, chosen: dict[str, int] | None) -> State:
    """Return a mixture's state with one feed-forward layer for the experts of each layer."""
    found: State = {}
    singles: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        if match := STACKED.fullmatch(name):
            layer, part = match["layer"], match["part"]
            one = value.mean(0) if chosen is None else value[chosen[layer]]
            if part == "down_proj":
                found[f"{layer}.down_proj.weight"] = one
            else:
                gate, up = one.chunk(2)
                # Halves of one tensor would be one copy.
                found[f"{layer}.gate_proj.weight"] = gate.clone()
                found[f"{layer}.up_proj.weight"] = up.clone()
        elif match := SINGLE.fullmatch(name):
            singles.setdefault(f"{match['layer']}.{match['part']}.weight", []).append(value)
        elif not ROUTER.fullmatch(name):
            found[name] = value
    for name, values in singles.items():
        layer = name.rsplit(".", 2)[0]
        found[name] = torch.stack(values).mean(0) if chosen is None else values[chosen[layer]]
    return found


def _check_shapes(state: State, expected: State) -> None:
    for name in expected:
        came = tuple(state[name].shape) if name in state else None
        if came != tuple(expected[name].shape):
            raise RecipeError(
                f"student.experts: {name} has shape {came}, the dense student's is "
                f"{tuple(expected[name].shape)}: layers without experts are of another width than "
                "the experts; keep the mixture"
            )
