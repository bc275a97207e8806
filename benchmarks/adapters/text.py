"""SmolLM2 on a domain it does not know: LoRA, Houlsby and prefixes, and peft beside ours."""

import math
import random
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.adapters.methods import Method
from benchmarks.adapters.places import bench_folder, measure_path
from benchmarks.claims import Claim, at_most, write_measure
from benchmarks.comparison import Estimate, paired_difference
from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.options import BottleneckOptions, LoraOptions, PrefixOptions
from stillroom.adapters.training import train_adapter
from stillroom.builtin import import_builtin
from stillroom.data.corpora import builtin_documents
from stillroom.data.examples import Examples
from stillroom.fine_tuning import fine_tune, measure
from stillroom.models import load_model, load_tokenizer, tokenizer_hash
from stillroom.training.history import HELD_OUT_LOSS, TrainingHistory
from stillroom.training.options import TrainingOptions

DOMAIN = "python-source"
LENGTH = 128  # tokens a row
TRAIN_ROWS, TEST_ROWS = 192, 48
BATCH = 4
SEED = 0
LORA = Method("LoRA, rank 8", LoraOptions(rank=8, alpha=16.0), 1e-3)
METHODS = (
    LORA,
    Method("Houlsby, width 32", BottleneckOptions(width=32), 1e-3),
    Method("prefix, 16 tokens", PrefixOptions(16), 1e-2),
)
PEFT = "LoRA, rank 8, by peft"


def measure_text() -> None:
    """Train each method once, and measure the loss of each held-out row."""
    train, test = (rows(side) for side in (0, 1))
    losses: dict[str, list[float]] = {"no adapter": _losses(_base(), test)}
    facts: dict[str, dict[str, Any]] = {"no adapter": {}}
    makers: dict[str, Callable[[], tuple[Any, TrainingHistory]]] = {
        method.name: lambda method=method: _ours(method, train)  # type: ignore[misc]
        for method in METHODS
    }
    makers[PEFT] = lambda: _by_peft(train)
    for name, make in makers.items():
        model, history = make()
        losses[name] = _losses(model, test)
        tokens = BATCH * LENGTH
        facts[name] = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": median(tokens / speed for speed in history.tokens_per_second),
        }
        print(f"{name}: {sum(losses[name]) / len(test):.4f} nats", flush=True)
    gained = {name: paired_difference([losses["no adapter"]], [of]) for name, of in losses.items()}
    write_measure(
        measure_path("text"),
        claims_of(losses, gained),
        text=f"CPython's {DOMAIN}",
        rows=[
            {
                "method": name,
                "nats": sum(of) / len(of),
                "perplexity": math.exp(sum(of) / len(of)),
                "gained": gained[name].value,
                "standard_error": gained[name].standard_error,
                **facts[name],
            }
            for name, of in losses.items()
        ],
        train_rows=TRAIN_ROWS,
        test_rows=TEST_ROWS,
        length=LENGTH,
    )


def claims_of(losses: dict[str, list[float]], gained: dict[str, Estimate]) -> list[Claim]:
    """Return what was promised: our LoRA learns what peft's does."""
    lost = paired_difference([losses[LORA.name]], [losses[PEFT]])
    share = (lost.value + 1.96 * lost.standard_error) / gained[PEFT].value
    return [
        at_most(
            "SmolLM2: what our LoRA gains less than peft's, over what peft's gains, upper 95 % "
            "bound",
            0.05,
            share,
            lost.standard_error / gained[PEFT].value,
        )
    ]


def rows(side: int) -> Examples:
    """Return rows to learn from (0) or to measure on (1), of other files."""
    tokenizer = load_tokenizer(_folder())
    texts = [document.text for document in builtin_documents(DOMAIN)]
    random.Random(1).shuffle(texts)
    half = len(texts) // 2
    wanted = (TRAIN_ROWS, TEST_ROWS)[side]
    ids: list[int] = []
    for text in (texts[:half], texts[half:])[side]:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= wanted * LENGTH * 4:
            break
    whole = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(SEED))
    chosen = whole[order[:wanted]].clone()
    places = torch.arange(len(chosen))
    mask = torch.ones_like(chosen)
    return Examples(chosen, mask, chosen, places, tokenizer_hash(tokenizer))


def _ours(method: Method, train: Examples) -> tuple[Any, TrainingHistory]:
    adapted = AdaptedModel(_base())
    adapted.add("a", method.options, seed=SEED)
    history = train_adapter(adapted, "a", train, _training(method))
    return adapted.eval(), history


def _by_peft(train: Examples) -> tuple[Any, TrainingHistory]:
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(SEED)
    options = LORA.options
    assert isinstance(options, LoraOptions)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=int(options.alpha),
        target_modules="all-linear",
    )
    model = get_peft_model(_base(), config)
    return model, fine_tune(model, train, _training(LORA))


def _training(method: Method) -> TrainingOptions:
    return TrainingOptions(batch_rows=BATCH, learning_rate=method.learning_rate, seed=SEED)


@torch.no_grad()
def _losses(model: Any, test: Examples) -> list[float]:
    model.eval()
    return [
        measure(model, test.take(torch.tensor([row])), 1)[HELD_OUT_LOSS] for row in range(len(test))
    ]


def _base() -> Any:
    return load_model(_folder(), dtype=torch.float32)


def _folder() -> Any:
    folder = bench_folder() / "smollm2"
    if not (folder / "config.json").exists():
        import_builtin("smollm2", folder)
    return folder
