"""Python code that a model brings along: it runs within `trusting_code` alone."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from stillroom.errors import MismatchError, SourceError

# Where transformers looks for the names of classes that a model's own files hold.
NAMED_IN = ("config.json", "tokenizer_config.json")
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_code(trusted: bool = True) -> Iterator[None]:
    """Let what is loaded here, in this thread, run code of its own; only code that you have read.

    Code that runs can do whatever its user can.
    """
    before = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(before)


def code_is_trusted() -> bool:
    """Return whether a model's own code may run here."""
    return _trusted.get()


def has_own_code(folder: Path) -> bool:
    """Return whether Python files of the folder decide how it is loaded."""
    return bool(_named_classes(folder)) and any(folder.glob("*.py"))


def require_trust(folder: Path) -> None:
    """Refuse a folder with code of its own where nobody trusts it, although other code may load it.

    Raises:
        SourceError: it is not trusted, or lies in another repository, which no revision pins.
    """
    if has_own_code(folder) and not code_is_trusted():
        raise untrusted(folder)
    elsewhere = [name for name in _named_classes(folder) if "--" in name]
    if elsewhere and code_is_trusted():
        raise SourceError(
            f"{folder} names code of another repository, {elsewhere[0]}, which may change any "
            "time: copy those files into the folder, and take what stands before -- out of auto_map"
        )


def untrusted(folder: Path | str) -> SourceError:
    """Return the error of code that nobody trusts."""
    return SourceError(
        f"{folder} is loaded by Python code of its own, which runs only where someone trusts it: "
        "read that code, then set teacher.trust_remote_code in the recipe (a registered version: "
        'model_config={"trust_remote_code": True}; stillroom pull and export: --trust-remote-code; '
        "the library: stillroom.remote_code)"
    )


def refuse_own_code(folder: Path, who: str) -> None:
    """Refuse a folder whose own code `who` would not run: it would compute something else.

    Raises:
        MismatchError: it has some.
    """
    if has_own_code(folder):
        raise MismatchError(
            f"{folder} is loaded by Python code of its own, which {who} does not run; keep our "
            "GPTQ format"
        )


def copy_code(source: Path, target: Path) -> None:
    """Give a folder the code of the one that it was made from, but for files that it has."""
    for file in source.glob("*.py"):
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _named_classes(folder: Path) -> list[str]:
    return [name for file in NAMED_IN for name in _names(_auto_map(folder / file))]


def _auto_map(file: Path) -> Any:
    try:
        return json.loads(file.read_text()).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads it says what is wrong


def _names(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for each in found.values() if isinstance(found, dict) else found:
            yield from _names(each)
