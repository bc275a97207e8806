"""Turn texts into rows of tokens: to learn from, to measure on, to calibrate with."""

from pathlib import Path

import torch
from torch import nn

from stillroom.adapters.prompted_base import row_limit
from stillroom.contents import Task
from stillroom.data.prepare import (
    SETS,
    PreparedData,
    PrepareOptions,
    prepare,
    save_prepared,
)
from stillroom.errors import RecipeError
from stillroom.labels import label_order
from stillroom.models import load_config, load_tokenizer, new_model, quiet, tokenizer_hash
from tasks.work.bench import Bench, Result
from tasks.work.texts import read_texts

SPARE_ROWS = 8
OPTIONS = PrepareOptions.__dataclass_fields__.keys() - {"seed"}


def work(bench: Bench) -> Result:
    """Write training, evaluation and calibration rows."""
    section = bench.section
    train = read_texts(bench, "train")
    evaluation = read_texts(bench, "evaluation") if "evaluation" in bench.order.sources else None
    teacher = bench.inputs["teacher"]
    tokenizer = load_tokenizer(teacher)
    options = PrepareOptions(
        seed=bench.order.seed, **{name: section[name] for name in OPTIONS & section.keys()}
    )
    data = prepare(
        options,
        train,
        evaluation,
        tokenizer,
        tokenizer_hash(tokenizer),
        bench.progress,
        label_order=label_order(teacher) if bench.task == "sequence_classification" else (),
    )
    _require_positions(data, teacher, options.task)
    save_prepared(data, bench.output)
    return Result(licence="as its texts", metrics=data.statistics)


def _require_positions(data: PreparedData, teacher: Path, task: Task) -> None:
    """Refuse rows with more tokens than the teacher's table of positions."""
    longest = max(getattr(data, name).input_ids.shape[1] for name in SETS)
    limit = _positions(teacher, task, longest)
    if limit is not None and longest > limit:
        raise RecipeError(
            f"data.sequence_length: rows of at most {limit} tokens expected, for which the teacher "
            f"has positions; one of {longest} came; set it to {limit} or less"
        )


def _positions(teacher: Path, task: Task, wanted: int) -> int | None:
    """Return how many tokens a row may have, None where no table of positions limits them."""
    config = load_config(teacher)
    if getattr(config, "relative_attention", False) and not config.position_biased_input:
        return None  # DeBERTa's table is of distances, and the farthest stands for all beyond
    places = getattr(config, "max_position_embeddings", None)
    padding = getattr(config, "pad_token_id", None) or 0
    # Some tables begin behind the padding's id: only near the end the model has to be looked at.
    if not isinstance(places, int) or wanted < places - (padding if padding < places else 0):
        return None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), torch.device("meta"):
        model = new_model(teacher, config, task=task, dtype=torch.float32)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    # OPT and BART have two rows more than positions.
    learned = any(places <= table.num_embeddings <= places + SPARE_ROWS for table in tables)
    return row_limit(model) if learned else None
