"""Measure what a model takes: parameters, bytes, and time on this machine."""

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.adapters.adapted_model import text_limit
from stillroom.errors import NotFiniteError, RecipeError
from stillroom.evaluation.estimates import Estimate
from stillroom.evaluation.figures import Cost
from stillroom.evaluation.quality import evaluating
from stillroom.hardware import processor, threads_here
from stillroom.layout import input_device
from stillroom.models import Task
from stillroom.progress import Progress, silent

__all__ = [
    "Cost",
    "Workload",
    "count_parameters",
    "folder_size_bytes",
    "hardware",
    "measure_cost",
    "memory_bytes",
]


@dataclass(frozen=True)
class Workload:
    """What is timed: one sequence (batch 1), prompt first, then greedy tokens one by one."""

    prefill_tokens: int = 128
    decode_tokens: int = 24
    repeats: int = 3
    """Timed repetitions after one warm-up; their median counts."""


def measure_cost(
    model: PreTrainedModel,
    size_on_disk_bytes: int,
    *,
    task: Task = "causal_lm",
    workload: Workload | None = None,
    progress: Progress = silent,
) -> Cost:
    """Measure `model`: count and weigh it, then time it at batch 1.

    Raises:
        RecipeError: the workload is longer than the model's context, less an adapter's tokens.
        NotFiniteError: the model's logits are NaN.
    """
    workload = workload or Workload()
    _require_context(model, task, workload)
    with evaluating([model]):
        prefill, decode = _time(model, task, workload, progress)
    generates = task == "causal_lm"
    steps = workload.decode_tokens if generates else 1
    return Cost(
        parameters=count_parameters(model),
        size_on_disk_bytes=size_on_disk_bytes,
        memory_bytes=memory_bytes(model),
        prefill_per_second=_rate(prefill, workload.prefill_tokens if generates else 1),
        prefill_unit="tokens/s" if generates else "sequences/s",
        decode_tokens_per_second=_rate(decode, steps) if generates else None,
        latency_ms=_median([1000 * s / steps for s in (decode if generates else prefill)]),
        hardware=hardware(),
    )


def folder_size_bytes(*folders: Path) -> int:
    """Return the size of all safetensors files below the folders, in bytes."""
    return sum(
        path.stat().st_size for folder in folders for path in sorted(folder.rglob("*.safetensors"))
    )


def count_parameters(model: torch.nn.Module) -> int:
    """Count the weights; a packed quantized linear counts as the (out, in) matrix it stands for."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        packed = getattr(module, "qweight", None)
        if not isinstance(packed, Tensor):
            continue
        own = dict(module.named_parameters(recurse=False))
        # Integers may be kept as frozen parameters: they are replaced by what they stand for.
        total -= sum(own[name].numel() for name in own if name != "bias")
        width, height = module.in_features, module.out_features
        assert isinstance(width, int)
        assert isinstance(height, int)
        total += height * width
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and "bias" not in own:
            total += bias.numel()
    return total


def memory_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors
    }
    return sum(storages.values())


def hardware() -> dict[str, str]:
    """Return what decides the speed here: processor, cores, threads, torch, GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "cpu": processor(),
        "cores": str(threads_here()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "gpu": gpu,
    }


def _require_context(model: PreTrainedModel, task: Task, workload: Workload) -> None:
    limit = text_limit(model)
    wanted = workload.prefill_tokens + (workload.decode_tokens if task == "causal_lm" else 0)
    if limit is not None and wanted > limit:
        raise RecipeError(
            f"the speed measurement wants {wanted} tokens and the model reads {limit} of a text; "
            "lower evaluation.prefill_tokens or evaluation.decode_tokens"
        )


def _time(
    model: PreTrainedModel, task: Task, workload: Workload, progress: Progress
) -> tuple[list[float], list[float]]:
    """Return the seconds of each repeat: prefill, and decode (empty for an encoder)."""
    device = input_device(model)
    draw = torch.Generator().manual_seed(0)
    size = (1, workload.prefill_tokens)
    ids = torch.randint(model.config.vocab_size, size, generator=draw).to(device)  # (1, prefill)
    prefill, decode = [], []
    for repeat in range(-1, workload.repeats):  # −1 warms up: allocation, kernel choice
        if task == "causal_lm":
            tokens = workload.decode_tokens if repeat >= 0 else min(2, workload.decode_tokens)
            first, rest = _generate(model, ids, tokens)
        else:
            first, output = _seconds(lambda: model(input_ids=ids), device)
            rest = 0.0
            _require_finite(output.logits)
        if repeat >= 0:
            prefill.append(first)
            decode.append(rest)
        progress(repeat + 2, workload.repeats + 1, "repeats")
    return prefill, decode


def _generate(model: PreTrainedModel, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds of the prompt and of `tokens` greedy steps with the KV cache."""
    # A PEFT model puts its virtual tokens in front at every call: right for the prompt, wrong
    # for the steps, which continue the cache on the model below.
    below: Any = getattr(model, "get_base_model", lambda: model)()
    last_only = "logits_to_keep" in inspect.signature(below.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
    first, output = _seconds(lambda: model(input_ids=ids, use_cache=True, **options), ids.device)
    _require_finite(output.logits)

    def steps() -> None:
        current = output
        for _ in range(tokens):
            best = current.logits[:, -1:].argmax(-1)  # (1, 1)
            current = below(input_ids=best, past_key_values=current.past_key_values, use_cache=True)

    rest, _ = _seconds(steps, ids.device)
    return first, rest


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _require_finite(logits: Tensor) -> None:
    if bool(logits.isnan().any()):
        raise NotFiniteError(
            "the model's logits are NaN on random tokens while its speed is measured; "
            "look for overflow in its weights, or load it in float32"
        )


def _rate(seconds: list[float], pieces: int) -> Estimate:
    return _median([pieces / max(each, 1e-9) for each in seconds])


def _median(values: list[float]) -> Estimate:
    """Return the median; the standard error is that of a normal sample's median."""
    middle = statistics.median(values)
    if len(values) < 2:
        return Estimate(middle, None, len(values))
    spread = statistics.stdev(values) * math.sqrt(math.pi / 2 / len(values))
    return Estimate(middle, spread, len(values))
