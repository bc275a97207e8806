"""Switch's table in small: how much of a mixture's gain a dense student of it keeps."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.claims import at_least, write_measure
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import FULL
from benchmarks.text import text_source, texts
from stillroom.data.examples import Examples
from stillroom.distillation.dense_student import dense_student
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.losses import hard_cross_entropy
from stillroom.distillation.teacher_cache import CacheOptions, TeacherCache, capture
from stillroom.fine_tuning import aligned_labels, measure
from stillroom.training.batches import Batch
from stillroom.training.loop import train
from stillroom.training.options import TrainingOptions

BYTES = 256  # the vocabulary
LENGTH = 128
BATCH = 16
STEPS = 2000 if FULL else 300
SEEDS = (0, 1, 2) if FULL else (0,)
TEST_ROWS = 256
EXPERTS = 8
BALANCE = 0.01  # weight of the load-balancing loss (Switch, section 2.2)
SHAPE = {
    "vocab_size": BYTES,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Recipe:
    """A row of the paper's table 7: where the student starts, and what it learns from."""

    start: Literal["random", "teacher"]
    soft_weight: float
    hard_weight: float


RECIPES = {
    "text alone (the dense twin)": Recipe("random", 0.0, 1.0),
    "teacher alone": Recipe("random", 1.0, 0.0),
    "teacher alone, its weights": Recipe("teacher", 1.0, 0.0),
    "0.25 teacher + 0.75 text, its weights": Recipe("teacher", 0.25, 0.75),
    "text alone, its weights": Recipe("teacher", 0.0, 1.0),
}
TWIN, DISTILLED, STARTED, MIXED, _ = RECIPES


def measure_mixture() -> None:
    """Train a mixture and its dense twin on text, and the students in between."""
    nats: dict[str, list[float]] = {}
    for seed in SEEDS:
        teacher = _mixture(seed)
        nats.setdefault("the mixture", []).append(_loss(teacher))
        folder = bench_folder() / "caches" / f"mixture-{seed}"
        options = CacheOptions(batch_rows=BATCH, rows_per_shard=1024)
        text = _rows(0)
        cached = capture(teacher, text, folder, options, tokenizer_hash=text.tokenizer_hash)
        for name, recipe in RECIPES.items():
            nats.setdefault(name, []).append(_loss(_student(teacher, cached, recipe, seed)))
    keep_mixture(nats)


def keep_mixture(nats: dict[str, list[float]]) -> None:
    """Keep what each model reaches on other text, by seed, in nats a byte, with the claims.

    Where the mixture is no better than its dense twin, there is no gain to have a share of.
    """
    mean = {name: sum(each) / len(each) for name, each in nats.items()}
    gain = mean[TWIN] - mean["the mixture"]
    rows = [
        {
            "model": name,
            "nats_per_byte": each,
            "share_of_gain": (mean[TWIN] - each) / gain if gain > 0 else None,
        }
        for name, each in mean.items()
    ]
    claims = [
        at_least(
            "Switch: nats a byte saved by the teacher's weights, learning from it alone",
            0.0,
            mean[DISTILLED] - mean[STARTED],
        ),
        at_least(
            "Switch: nats a byte saved by mixing in the text, from the teacher's weights",
            0.0,
            mean[STARTED] - mean[MIXED],
        ),
    ]
    facts = {"text": text_source(), "steps": STEPS, "seeds": len(SEEDS), "nats": nats}
    write_measure(measure_path("mixture"), claims, rows=rows, **facts)


def _balanced(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Return cross-entropy and the loss that keeps the experts equally used."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        output_router_logits=True,
    )
    loss = hard_cross_entropy(output.logits, aligned_labels(batch))
    return loss + BALANCE * output.aux_loss, {"cross_entropy_nats": loss.item()}


def _mixture(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **SHAPE,
        moe_intermediate_size=SHAPE["intermediate_size"],
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        norm_topk_prob=False,  # or the router of a single expert would get no gradient
    )
    model = Qwen3MoeForCausalLM(config)
    train(model, _rows(0), _balanced, _training(seed))
    return model.eval()


def _student(teacher: Any, cached: TeacherCache, recipe: Recipe, seed: int) -> Any:
    torch.manual_seed(seed + 1)
    if recipe.start == "teacher":
        student = dense_student(teacher, "mean")
    else:
        student = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    options = DistillationOptions(_training(seed), recipe.soft_weight, recipe.hard_weight)
    distill(student, Taught(_rows(0), cached if recipe.soft_weight else None), options)
    return student


def _training(seed: int) -> TrainingOptions:
    return TrainingOptions(steps=STEPS, batch_rows=BATCH, learning_rate=2e-3, seed=seed)


def _loss(model: Any) -> float:
    model.eval()
    return measure(model, _rows(1), BATCH)["held_out_cross_entropy_nats"]


@cache
def _rows(side: int) -> Examples:
    """Return the training text (0) or other text (1) as rows of bytes."""
    ids = torch.tensor(list(texts()[side].encode()), dtype=torch.long)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if side:
        rows = rows[torch.linspace(0, len(rows) - 1, TEST_ROWS).long()]
    return Examples(rows, torch.ones_like(rows), rows, torch.arange(len(rows)), "bytes")
