"""peft's own implementation beside ours, where both exist, on the full base."""

import json
from statistics import fmean
from typing import Any

import torch

from benchmarks.adapters.methods import DEEP_PROMPT, LORA, P_TUNING, PREFIX, PROMPT, Method
from benchmarks.adapters.places import cell_path, measure_path
from benchmarks.adapters.work import (
    BASES,
    PRECISION,
    SEEDS,
    base_folder,
    load_base,
    result_of,
    test_examples,
    test_rows,
    train_rows,
    training,
)
from benchmarks.claims import write_measure
from benchmarks.side_by_side import side_by_side
from benchmarks.sst2 import correct, has_sst2, points_lost
from stillroom.adapters.options import LoraOptions, PrefixOptions, PromptOptions, PTuningOptions
from stillroom.fine_tuning import fine_tune

COMPARED = (LORA, PREFIX, DEEP_PROMPT, PROMPT, P_TUNING)


def measure_by_peft() -> None:
    """Train each method as peft has it, at our learning rate, with every seed; compare."""
    if not has_sst2():
        return
    base_folder(BASES[0])
    cells = [(method, seed) for seed in SEEDS for method in COMPARED]
    theirs = side_by_side(_theirs, cells, PRECISION)
    ours = side_by_side(_ours, cells, PRECISION)
    rows = [_row(method, cells, ours, theirs) for method in COMPARED]
    write_measure(measure_path("by_peft"), [], text="SST-2", rows=rows, seeds=len(SEEDS))


def _ours(method: Method, seed: int) -> dict[str, Any]:
    return result_of(method, BASES[0], seed)


def _theirs(method: Method, seed: int) -> dict[str, Any]:
    path = cell_path(f"by-peft {method.name} {seed}".replace(" ", "-").replace(",", ""))
    if not path.exists():
        from peft import get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(load_base(BASES[0]), _config(method))
        fine_tune(model, train_rows(), training(method, seed))
        head = ("classifier", "score")
        trained = sum(
            value.numel()
            for name, value in model.named_parameters()
            if value.requires_grad and not any(part in head for part in name.split("."))
        )
        found = {"right": correct(model, test_rows()), "trained": trained}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        accuracy = 100 * fmean(found["right"])
        print(f"{method.name} by peft, seed {seed}: {accuracy:.2f} %", flush=True)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def _config(method: Method) -> Any:
    """Return what peft has to be told for the same method."""
    import peft

    task: dict[str, Any] = {"task_type": peft.TaskType.SEQ_CLS}
    match method.options:
        case LoraOptions() as lora:
            # Its "all-linear" means the pooler too.
            layers = r"bert\.encoder\.layer\..*\.(query|key|value|dense)"
            alpha = int(lora.alpha)
            return peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=layers, **task)
        case PrefixOptions() as prefix:
            encoder = prefix.encoder_width
            return peft.PrefixTuningConfig(
                num_virtual_tokens=prefix.num_virtual_tokens,
                prefix_projection=encoder is not None,
                encoder_hidden_size=encoder,
                **task,
            )
        case PromptOptions() as prompt:
            return peft.PromptTuningConfig(num_virtual_tokens=prompt.num_virtual_tokens, **task)
        case PTuningOptions() as p_tuning:
            tokens = sum(count for _, count in p_tuning.template)
            return peft.PromptEncoderConfig(
                num_virtual_tokens=tokens,
                encoder_reparameterization_type="LSTM",
                encoder_hidden_size=p_tuning.encoder_width,
                **task,
            )
    raise AssertionError(method)


def _row(
    method: Method,
    cells: list[tuple[Method, int]],
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
) -> dict[str, Any]:
    places = [place for place, (of, _) in enumerate(cells) if of == method]
    mine, other = ([found[place]["right"] for place in places] for found in (ours, theirs))
    lost = points_lost(other, mine, test_examples())
    return {
        "method": method.name,
        "trained": ours[places[0]]["trained"],
        "peft_trained": theirs[places[0]]["trained"],
        "accuracy": 100 * fmean(map(fmean, mine)),
        "peft_accuracy": 100 * fmean(map(fmean, other)),
        "lost": lost.value,
        "standard_error": lost.standard_error,
    }
