"""Text that every CPython carries: reference topics, source code and docstrings."""

import ast
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from stillroom.data.documents import Document, normalise, paragraphs
from stillroom.errors import SourceError

BUILTIN_CORPORA = ("python-docs", "python-docstrings", "python-source")

# Modules outside these bounds are stubs or tables (in characters).
SOURCE_CHARACTERS = (2_000, 100_000)
DOCSTRING_CHARACTERS = 40
DOCSTRING_LABELS = 8
# Tests, bundled programs, and what is gone from later versions.
LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils"}
    | {"site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data"}
)


def builtin_documents(name: str) -> list[Document]:
    """Return the documents of a text that the running CPython carries.

    `python-docs`: one a topic of `pydoc_data.topics`. `python-source`: one a top-level module of
    the standard library of 2 000 to 100 000 characters. `python-docstrings`: one a docstring of
    at least 40 characters, labelled with its top-level module, the 8 that have most of them.

    Raises:
        SourceError: the name is unknown, or this CPython was installed without the text.
    """
    match name:
        case "python-docs":
            documents = _topics()
        case "python-source":
            documents = _sources()
        case "python-docstrings":
            documents = _docstrings()
        case _:
            known = ", ".join(BUILTIN_CORPORA)
            raise SourceError(f"built-in text expected: one of {known}; {name!r} came")
    if not documents:
        raise SourceError(
            f"built-in text {name} expected in {_library()}: nothing is there; use a CPython that "
            "is installed with its standard library as files"
        )
    return documents


def corpus_fingerprint(name: str) -> str:
    """Return the SHA-256 of the built-in text as it is on this machine.

    Raises:
        SourceError: as `builtin_documents`.
    """
    if name == "python-docstrings":
        # Parsing the standard library takes seconds, and a plan has no use for what it yields.
        whole = sha256()
        for path, _ in _modules():
            whole.update(f"{path.relative_to(_library())}\0".encode() + path.read_bytes())
        return whole.hexdigest()
    rows = [(d.name, d.family, d.label, d.text) for d in builtin_documents(name)]
    return sha256(json.dumps(rows).encode()).hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [
        Document(text=text, name=f"python-docs/{topic}", family=topic)
        for topic, text in sorted(topics.items())
    ]


def _sources() -> list[Document]:
    low, high = SOURCE_CHARACTERS
    documents = []
    for path in sorted(_library().glob("*.py")):
        if path.stem in sys.stdlib_module_names and not path.stem.startswith("_sysconfigdata"):
            text = _read(path)
            if low <= len(text) <= high:
                name = f"python-source/{path.stem}"
                documents.append(Document(text=text, name=name, family=path.stem))
    return documents


def _docstrings() -> list[Document]:
    found: dict[str, list[Document]] = {}
    for path, top in _modules():
        for name, text in _docstrings_of(path):
            document = Document(
                text=text, label=top, name=f"python-docstrings/{name}", family=_first_sentence(text)
            )
            found.setdefault(normalise(text), []).append(document)
    # A docstring that two packages share has no one right label.
    unambiguous = [same[0] for same in found.values() if len({d.label for d in same}) == 1]
    counts = Counter(document.label for document in unambiguous)
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    kept = set(ranked[:DOCSTRING_LABELS])
    return [document for document in unambiguous if document.label in kept]


def _modules() -> Iterator[tuple[Path, str]]:
    """Yield each public source file of the standard library and its top-level name, sorted."""
    root = _library()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        top = parts[0]
        if top.startswith("_") or top not in sys.stdlib_module_names:
            continue
        if not LEFT_OUT.intersection(parts):
            yield path, top


def _docstrings_of(path: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        # Old escapes in the parsed file are not this program's to report.
        warnings.simplefilter("ignore")
        tree = ast.parse(_read(path))
    module = ".".join(path.relative_to(_library()).with_suffix("").parts)
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= DOCSTRING_CHARACTERS:
                yield f"{module}:{getattr(node, 'name', '')}", text


def _first_sentence(text: str) -> str:
    paragraph = normalise(paragraphs(text)[0])
    return re.split(r"(?<=[.!?:])\s", paragraph, maxsplit=1)[0]


def _read(path: Path) -> str:
    import tokenize

    try:
        # Source files state their own encoding.
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise SourceError(f"source file expected at {path}: {error}; reinstall Python") from error
