"""The sections of a recipe: one frozen model a stage, each field with its range and unit.

Training, distillation and quantization have a file each.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stillroom.config.section import Count, Fraction, Identifier, Section, Source
from stillroom.config.training import Training


class Vocabulary(Section):
    """Which words of a teacher stay, of which every other text can still be made."""

    minimum_uses: Count = 1
    """Times that the recipe's texts, training, evaluation and adapters', use a word that stays;
    single characters, special tokens and what longer words are merged from stay in any case."""


class Model(Section):
    """A model that exists: where it is, and how it is loaded."""

    source: Source
    """A hub id, a local folder, s3://bucket/prefix, models:/name@alias, or builtin:smollm2 and
    builtin:minilm."""
    revision: str | None = None
    """Commit or tag on the hub; pin it, so that the same recipe means the same model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the model is computed."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships; only for repositories you have read."""
    config: str | None = None
    """Local file with a snapshot of the model's config.json, for estimates without the hub."""
    fine_tune: Training | None = None
    """Train the teacher on the labels or hidden words first; present for a teacher that has never
    seen the task."""
    vocabulary: Vocabulary | None = None
    """Cut the teacher's words down to those that the texts use: smaller embeddings and head, for
    every model that comes of it; absent: all words stay."""


class Text(Section):
    """A text that exists: where it is, and which columns hold what."""

    source: Source
    """A hub dataset id, a local file or folder, s3://bucket/prefix, or builtin:python-docs,
    builtin:python-source, builtin:python-docstrings."""
    revision: str | None = None
    """Commit or tag on the hub."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    format: Literal["auto", "txt", "jsonl", "csv", "parquet"] = "auto"
    """Format of local and S3 files; auto goes by the file's ending."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str | None = None
    """Column that holds the class, for classification."""
    messages_column: str | None = None
    """Column that holds a conversation as a list of {role, content}."""


class Data(Section):
    """Which texts are learned from, and how they become rows of tokens."""

    train: Text
    """Text to learn from; calibration rows are drawn from it too."""
    evaluation: Text | None = None
    """Text to measure on; absent: documents held out of the training text."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents held out where no evaluation text is given."""
    sequence_length: Annotated[int, Field(ge=8, le=131072)] = 512
    """Tokens in a row."""
    pack: bool = True
    """Fill rows with the end of one text and the start of the next (language models only)."""
    masked_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of a row's words that are hidden for the model to name (masked_lm only)."""
    min_characters: Annotated[int, Field(ge=0)] = 20
    """Shorter texts are left out, in characters."""
    max_characters: Count = 10_000_000
    """Longer texts are left out, in characters."""
    deduplicate: bool = True
    """Leave out texts that are there twice."""
    max_train_tokens: Count | None = None
    """Most tokens to learn from; rows beyond it are left out, drawn from all texts."""
    max_evaluation_tokens: Count | None = None
    """Most tokens to measure on."""
    calibration_rows: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Rows drawn from the training rows to calibrate the quantization."""
    leak_ngram: Annotated[int, Field(ge=4, le=100)] = 13
    """Words in a row that count as evaluation text found in the training text."""
    on_leak: Literal["drop", "fail"] = "drop"
    """Drop the training texts that hold evaluation text, or stop."""


class Evaluation(Section):
    """What is measured, and for how long."""

    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 4
    """Rows measured in one forward pass."""
    prefill_tokens: Annotated[int, Field(ge=1, le=131072)] = 128
    """Prompt length of the speed measurement, in tokens."""
    decode_tokens: Annotated[int, Field(ge=1, le=131072)] = 24
    """Tokens generated one by one in the speed measurement."""
    repeats: Annotated[int, Field(ge=2, le=1000)] = 3
    """Timed repetitions; the median counts."""


class Gates(Section):
    """What must hold before a result may be published; the 95 % bound of each figure counts."""

    max_perplexity_ratio: Annotated[float, Field(ge=1)] | None = None
    """Final model's perplexity over the teacher's, at most; of hidden words for masked_lm."""
    max_kl_nats: Annotated[float, Field(ge=0)] | None = None
    """Divergence of the final model from the teacher, at most, in nats a token."""
    min_agreement: Fraction | None = None
    """Share of positions where final model and teacher prefer the same token, at least."""
    min_accuracy_ratio: Fraction | None = None
    """Final model's accuracy over the teacher's, at least (classes, hidden words)."""
    max_champion_loss_nats: Annotated[float, Field(ge=0)] | None = None
    """Loss added against the registered champion on the same text, at most, in nats a token."""
    max_size_bytes: Count | None = None
    """Size of the final model's weights on disk, at most, in bytes."""
    min_decode_tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Tokens generated a second, at least."""
    max_reload_difference: Annotated[float, Field(gt=0)] = 1e-3
    """Largest change of a logit after saving and loading afresh, over the largest logit."""


def _not_reserved(alias: str) -> str:
    """Refuse what MLflow resolves by itself: the newest version, or one by its number."""
    if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError(
            f"expected an alias that can be moved; {alias} is one that MLflow gives by itself; "
            "take another, such as champion"
        )
    return alias


class Publish(Section):
    """Where the result is registered."""

    name: Identifier
    """Name of the registered model; each adapter is registered as name-adapter."""
    alias: Annotated[
        str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"), AfterValidator(_not_reserved)
    ] = "champion"
    """Alias that moves to the new version if every gate passes."""
    approval: bool = False
    """Whether someone is asked before the alias moves: a deployment's run suspends itself with the
    table and a form, any other run says which command approves it."""
    approval_timeout_hours: Annotated[float, Field(gt=0, le=8760)] = 168
    """Hours that a suspended run waits for the answer before it fails; the version stays."""


class Execution(Section):
    """On what the stages run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What the models are computed on; a machine without it refuses the recipe."""
    over: Literal["here", "workers"] = "here"
    """Where stages that compute with a model run: in the flow's process tree; or on workers, as
    runs of a Prefect deployment, which its work pool places. They need the same STILLROOM_STORE;
    models and texts are fetched and prepared where the flow runs."""
    deployment: Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")] = "make-stage/make-stage"
    """The deployment that `over: workers` runs, as flow/deployment; its workers are machines of one
    class: speeds that they measured are compared."""
    teacher_device_map: Literal["auto"] | None = None
    """auto: a teacher that one GPU cannot hold lies over all of them, then memory, then the disk,
    where it is asked and measured (accelerate's device map)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of one stage; absent: one a processor. The same number gives the same bytes."""
    cache_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that ask the teacher, each with the teacher in memory and a share of the threads;
    their number changes nothing of what comes of it as long as that share is the same."""
    cache_over: Literal["processes", "prefect", "ray"] = "processes"
    """Where they run: processes of this machine; runs of a Prefect deployment, which its work pool
    places; or tasks of the Ray cluster that RAY_ADDRESS names (one of this machine if it names
    none). Elsewhere each takes all threads, and needs the same STILLROOM_STORE."""
    cache_deployment: Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")] = "ask-teacher/ask-teacher"
    """The deployment that `cache_over: prefect` runs, as flow/deployment."""
    training_processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that train one model together on this machine, each with a share of the threads, or
    a GPU of its own; a step's gradient_accumulation batches are dealt out to them, so their number
    changes what comes of it by rounding alone."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each of these processes holds: ddp the whole model; fsdp a share of its parameters,
    gradients and the optimizer's moments."""
