"""Bring a model from wherever it is into the store, as a safetensors checkpoint."""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stillroom.builtin import builtin_model, import_builtin
from stillroom.errors import SourceError
from stillroom.models import load_config, load_tokenizer, read_config, tokenizer_hash
from tasks.sources import fetch_folder
from tasks.work.bench import Bench, Result

# Weights in other formats can run code when they are read, and are left behind.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
CODE = ("*.py",)
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def work(bench: Bench) -> Result:
    """Write the model's folder, with the number format that the recipe asks for."""
    source, licence = bench.source("source"), "unknown"
    if source.place == "builtin":
        name = source.reference.removeprefix("builtin:")
        import_builtin(name, bench.output)
        licence = builtin_model(name).licence
    else:
        wanted = WANTED + (CODE if bench.section["trust_remote_code"] else ())
        if source.place == "hub":
            folder, licence = _download(source.reference, source.identity, wanted)
        else:
            folder = fetch_folder(source, bench.scratch / "source")
        _copy(folder, bench.output, wanted)
    _check(bench.output, source.reference)
    _note_dtype(bench.output, bench.section["dtype"])
    return Result(licence=licence)


def _download(repo: str, commit: str, wanted: tuple[str, ...]) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        folder = snapshot_download(repo, revision=commit, allow_patterns=list(wanted))
        card = HfApi().model_info(repo, revision=commit).card_data
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"model {repo} at {commit[:12]} cannot be downloaded ({type(error).__name__}); check "
            "the network and, for a gated model, HF_TOKEN; a rerun goes on with what is there"
        ) from error
    return Path(folder), str(card.get("license", "unknown")) if card else "unknown"


def _copy(folder: Path, output: Path, wanted: tuple[str, ...]) -> None:
    for pattern in wanted:
        for file in folder.glob(pattern):
            shutil.copyfile(file, output / file.name)


def _check(folder: Path, reference: str) -> None:
    if "auto_map" in read_config(folder):
        load_config(folder)  # code of its own may be needed, and not be trusted or be elsewhere
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise SourceError(
            f"{reference} has no safetensors files; other formats can run code when they are read: "
            "convert it first (save_pretrained writes safetensors)"
        )
    for file in files:
        _check_whole(file, reference)
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index, reference)
    tokenizer_hash(load_tokenizer(folder))


def _check_whole(file: Path, reference: str) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise SourceError(
            f"{reference} cannot be loaded: {file.name} is truncated or damaged ({error}); fetch "
            "it again"
        ) from error


def _check_index(index: Path, reference: str) -> None:
    """Refuse an index of shards that names others than those beside it: somebody else's, perhaps.

    Shards may be absent that nobody reads: of another variant, or beside the whole model's file.
    """
    try:
        named = set(map(str, json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{reference} cannot be loaded: {index.name} is no index of safetensors files "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    there = {file.name for file in index.parent.glob("*.safetensors")}
    read = index.name == INDEX and WHOLE not in there
    wrong = [name for name in named - there if read or Path(name).name != name]
    if wrong:
        raise SourceError(
            f"{reference} cannot be loaded: {index.name} names {min(wrong)!r}, expected one of the "
            "safetensors files beside it; fetch all of them again"
        )


def _note_dtype(folder: Path, dtype: str) -> None:
    config = read_config(folder)
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
