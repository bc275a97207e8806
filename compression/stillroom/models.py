"""Load and save models and tokenizers: folders in Hugging Face's layout, safetensors only."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from stillroom.completeness import require_whole
from stillroom.errors import SourceError
from stillroom.layout import Layout
from stillroom.remote_code import code_is_trusted, has_own_code, require_trust, untrusted

if TYPE_CHECKING:  # a tokenizer needs nothing of what models are loaded with, which takes seconds
    from transformers import PreTrainedModel

Task = Literal["causal_lm", "masked_lm", "sequence_classification", "seq2seq_lm"]
Weights = Literal["dense", "packed"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Of the decoders those whose classifier's head is not called `score`.
POOL_AT_PADDING = ("ctrl", "modernbert-decoder")


def model_class(task: Task) -> Any:
    """Return the transformers class that loads models for `task`."""
    match task:
        case "causal_lm":
            return AutoModelForCausalLM
        case "masked_lm":
            return AutoModelForMaskedLM
        case "sequence_classification":
            return AutoModelForSequenceClassification
        case "seq2seq_lm":
            return AutoModelForSeq2SeqLM


def load_model(
    folder: Path,
    *,
    task: Task = "causal_lm",
    dtype: torch.dtype | None = None,
    weights: Weights = "dense",
    laid_out: Layout | None = None,
) -> "PreTrainedModel":
    """Return the model in `folder`, in evaluation mode, by default in the saved dtype.

    A GPTQ checkpoint loads too: "packed" keeps its integers and unpacks one layer at a time,
    "dense" unpacks all of it once. A model that one device cannot hold is laid out over several.

    Raises:
        SourceError: the folder holds no model, only a part of one, only files that are not
            safetensors, or for masked_lm a model without a head that names words; or a GPTQ
            checkpoint is to be laid out.
    """
    config = read_config(folder)
    if task == "masked_lm":
        _require_word_head(config, folder)
    dtype = dtype or saved_dtype(config)
    if "quantization_config" in config:
        if laid_out is not None:
            raise SourceError(f"{folder} is quantized: such a model is not laid out over devices")
        from stillroom.quantization.formats.loading import load_quantized

        return load_quantized(folder, task=task, dtype=dtype, weights=weights)
    # A classifier's head may come from an adapter.
    new_head = task == "sequence_classification"
    return load_pretrained(folder, task=task, dtype=dtype, laid_out=laid_out, new_head=new_head)


def load_pretrained(
    folder: Path | str,
    *,
    task: Task,
    dtype: torch.dtype = torch.float32,
    label_names: tuple[str, ...] = (),
    laid_out: Layout | None = None,
    new_head: bool = True,
) -> "PreTrainedModel":
    """Return the full-precision model in `folder`, with a new head where `label_names` ask for one.

    A head for another number of classes is not kept. One that it lacks is drawn, for training,
    unless `new_head` says no.

    Raises:
        SourceError: transformers cannot load it, or its files lack a part of it.
    """
    further: dict[str, Any] = {}
    if label_names:
        further = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: i for i, name in enumerate(label_names)},
            "ignore_mismatched_sizes": load_config(Path(folder)).num_labels != len(label_names),
        }
    if laid_out is not None:
        further |= {"device_map": laid_out.device_map, "offload_folder": str(laid_out.offloaded)}
    with _loading(folder, f"cannot be loaded as {task}"):
        model, found = model_class(task).from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=code_is_trusted(),
            output_loading_info=True,
            **further,
        )
        require_whole(model, found, folder, new_head=new_head)
        if task == "sequence_classification":
            _tell_padding(model, Path(folder))
    return model.eval()  # type: ignore[no-any-return]


def load_body(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the full-precision model in `folder` without a head.

    Raises:
        SourceError: transformers cannot load it.
    """
    with _loading(folder, "cannot be loaded without its head"):
        model = AutoModel.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=code_is_trusted()
        )
    return model.eval()  # type: ignore[no-any-return]


def load_config(folder: Path) -> PreTrainedConfig:
    """Return the model's configuration as transformers reads it.

    Raises:
        SourceError: transformers does not know such models.
    """
    with _loading(folder, "is no model that transformers knows"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=code_is_trusted()
        )
        return config


def new_model(folder: Path, config: PreTrainedConfig, *, task: Task, dtype: torch.dtype) -> Any:
    """Return the model that a folder's `config` describes, with the numbers that it begins with.

    Raises:
        SourceError: transformers has no such model for the task.
    """
    with _loading(folder, f"cannot be loaded as {task}"):
        model = model_class(task).from_config(
            config, dtype=dtype, trust_remote_code=code_is_trusted()
        )
        if task == "sequence_classification":
            _tell_padding(model, folder)
        return model


def load_tokenizer(folder: Path | str) -> Any:
    """Return the tokenizer in `folder`.

    Raises:
        SourceError: there is none.
    """
    with _loading(folder, "holds no tokenizer"):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=code_is_trusted())


def save_model(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that `from_pretrained` loads: config, safetensors, tokenizer."""
    # The name of the folder it came from says nothing on another machine, and changes the bytes.
    model.config._name_or_path = ""
    with quiet():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the model's config.json.

    Raises:
        SourceError: there is none, or it is no JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise SourceError(
            f"{folder} holds no model: expected a folder with config.json and safetensors files"
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}/config.json cannot be read: {error}") from error
    if config.get("quantization_config") is None:
        config.pop("quantization_config", None)  # null is none, as transformers reads it
    return config


def saved_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the number format that a config.json names; float32 where it names none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a SHA-256 that two tokenizers share when they turn every text into the same ids."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Both are switched by each call and say nothing of the ids.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    rules["template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and warning of heads that are new on purpose."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _require_word_head(config: dict[str, Any], folder: Path) -> None:
    """Refuse a bare encoder: transformers would give it a head of random weights."""
    name = (config.get("architectures") or [""])[0]
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        raise SourceError(
            f"{folder} holds a {name}, which has no head that names words: a model saved as "
            "ForMaskedLM expected; take one, or set teacher.fine_tune to train a head first"
        )


def _tell_padding(model: Any, folder: Path) -> None:
    """Have a classifier that reads the last token before padding know what rows are padded with."""
    # Encoders are left alone: some count positions from the padding that they were trained with.
    pools = hasattr(model, "score") or model.config.model_type in POOL_AT_PADDING
    if pools and any((folder / name).exists() for name in TOKENIZER_FILES):
        from stillroom.data.tokens import padding_id

        model.config.get_text_config().pad_token_id = padding_id(load_tokenizer(folder))


@contextmanager
def _loading(folder: Path | str, refusal: str) -> Iterator[None]:
    """Say in one line why transformers does not load a folder, and run no code unasked."""
    require_trust(Path(folder))
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise untrusted(folder) from error
        raise SourceError(f"{folder} {refusal}: {_line(error)}") from error
    except ImportError as error:
        if not has_own_code(Path(folder)):
            raise
        raise SourceError(f"{folder} {refusal}: its own code needs {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
