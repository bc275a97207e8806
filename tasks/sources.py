"""References to models and texts: what they point at now, and how it gets here."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.builtin import builtin_file
from stillroom.checkpoint import files_below, sha256_of
from stillroom.errors import SourceError, StoreError

Place = Literal["builtin", "hub", "local", "s3", "registry"]
DOWNLOADS = 5
MD5_DIGITS = 32


@dataclass(frozen=True)
class Source:
    """A reference and the identity of what it points at: a content hash, commit or version."""

    reference: str
    place: Place
    identity: str


def place_of(reference: str) -> Place:
    """Return what kind of place a reference names.

    Raises:
        SourceError: it has the form of none.
    """
    if reference.startswith("builtin:"):
        return "builtin"
    if reference.startswith("s3://"):
        return "s3"
    if reference.startswith("models:/"):
        return "registry"
    if reference.startswith((".", "/", "~")) or Path(reference).exists():
        return "local"
    if re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", reference):
        return "hub"
    raise SourceError(
        f"{reference!r}: no such file or folder; expected builtin:NAME, a local path, a hub id "
        "such as owner/name, s3://bucket/prefix, or models:/name@alias"
    )


def resolve_model(reference: str, revision: str | None) -> Source:
    """Return what a model reference points at now.

    Raises:
        SourceError: it points at nothing, or the place cannot be asked.
    """
    match place := place_of(reference):
        case "builtin":
            identity = sha256_of(builtin_file(reference.removeprefix("builtin:")))
        case "local":
            folder = Path(reference).expanduser()
            if not (folder / "config.json").is_file():
                raise SourceError(
                    f"{reference} holds no model: expected a folder with config.json and "
                    "safetensors files"
                )
            identity = _content(folder)
        case "hub":
            identity = hub_commit(reference, revision, "model")
        case "s3":
            identity = _s3_identity(reference)
        case "registry":
            identity = registry_version(reference)[2]
    return Source(reference, place, identity)


def resolve_text(reference: str, revision: str | None) -> Source:
    """Return what a text reference points at now.

    Raises:
        SourceError: it points at nothing, or the place cannot be asked.
    """
    match place := place_of(reference):
        case "builtin":
            from stillroom.data.corpora import corpus_fingerprint

            identity = corpus_fingerprint(reference.removeprefix("builtin:"))
        case "local":
            path = Path(reference).expanduser()
            if not path.exists():
                raise SourceError(f"{reference}: no such file or folder")
            identity = _content(path)
        case "hub":
            identity = hub_commit(reference, revision, "dataset")
        case "s3":
            identity = _s3_identity(reference)
        case "registry":
            raise SourceError(f"{reference} is a model; a text is expected here")
    return Source(reference, place, identity)


def hub_commit(repo: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """Return the commit that `revision` of a hub repository names now; 40 digits stand for itself.

    Raises:
        SourceError: the hub does not answer, or has no such repository.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        info: Any = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=10)
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise SourceError(
            f"{kind} {repo} cannot be found on the hub ({type(error).__name__}): check the name "
            "and the network, pin `revision` to a commit, or give a local folder"
        ) from error
    return str(info.sha)


def registry_version(reference: str) -> tuple[str, str, str]:
    """Return name, version and identity of `models:/name@alias` or `models:/name/version`.

    Raises:
        SourceError: MLflow knows no such version.
    """
    from tasks.registered import find_version

    found = find_version(reference)
    if found is None:
        raise SourceError(f"{reference}: MLflow has no such registered version")
    return found


def fetch_folder(source: Source, folder: Path) -> Path:
    """Return a local folder with the files of a local, S3 or registered source.

    Raises:
        SourceError: it is not there any more, or is not what it was when it was resolved.
    """
    match source.place:
        case "local":
            path = Path(source.reference).expanduser()
        case "s3":
            path = _fetch_s3(source.reference, folder)
        case "registry":
            from tasks.registered import download_version

            # An alias can move meanwhile: the version is fetched whose identity was compared.
            name, version, now = registry_version(source.reference)
            _require_unchanged(source, now)
            return download_version(f"models:/{name}/{version}", folder)
        case _:
            raise SourceError(f"{source.reference} is not a folder of files")
    now = _content(path) if source.place == "local" else _s3_identity(source.reference)
    _require_unchanged(source, now)
    return path


def _require_unchanged(source: Source, now: str) -> None:
    if now != source.identity:
        raise SourceError(f"{source.reference} has changed while the flow ran; run it again")


def _content(path: Path) -> str:
    """Return a hash of a file and its ending, or of the names and contents of a folder's files.

    The ending says how a text is read.
    """
    whole = hashlib.sha256()
    if path.is_file():
        whole.update(f"{path.suffix.lower()}\0{sha256_of(path)}\n".encode())
        return whole.hexdigest()
    for file in files_below(path):
        # A name may be of any bytes.
        whole.update(os.fsencode(f"{file.relative_to(path)}\0{sha256_of(file)}\n"))
    return whole.hexdigest()


def _s3_identity(reference: str) -> str:
    whole = hashlib.sha256()
    for name, size, etag in _s3_objects(reference):
        whole.update(f"{name}\0{size}\0{etag}\n".encode())
    return whole.hexdigest()


def _s3_objects(reference: str) -> list[tuple[str, int, str]]:
    from tasks.store.s3_client import s3_client

    bucket, _, prefix = reference.removeprefix("s3://").partition("/")
    with _reading(reference):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [
            (item["Key"], item["Size"], item["ETag"])
            for page in pages
            for item in page.get("Contents", [])
            if item["Key"] == prefix or item["Key"].startswith(prefix.rstrip("/") + "/")
            if item["Size"] or not item["Key"].endswith("/")  # what pages show as a folder
        ]
    if not objects:
        raise SourceError(f"{reference}: no such object, and no objects below it")
    return sorted(objects)


@contextmanager
def _reading(reference: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError, StoreError) as error:
        raise SourceError(f"{reference} cannot be read: {' '.join(str(error).split())}") from error


def _fetch_s3(reference: str, folder: Path) -> Path:
    from tasks.store.s3_client import s3_client

    bucket, _, prefix = reference.removeprefix("s3://").partition("/")
    objects, client = _s3_objects(reference), s3_client()
    for name, _, etag in objects:
        relative = name.removeprefix(prefix).lstrip("/") or Path(name).name
        if ".." in Path(relative).parts:
            raise SourceError(
                f"s3://{bucket}/{name}: its name leads out of the folder that it is fetched into; "
                "rename it, or name a prefix without it"
            )
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(DOWNLOADS):
            with _reading(f"s3://{bucket}/{name}"):
                client.download_file(bucket, name, str(target))
            if _as_stored(target, etag):
                break
        else:
            raise SourceError(
                f"s3://{bucket}/{name} came {DOWNLOADS} times, and never with the MD5 that its "
                "server says it has: check what lies between, then run again"
            )
    single = len(objects) == 1 and objects[0][0] == prefix
    return folder / Path(prefix).name if single else folder


def _as_stored(file: Path, etag: str) -> bool:
    """Return whether a file is the object of that ETag, as far as an ETag tells.

    It is the content's MD5 where the object came in one piece and is not encrypted by a key.
    """
    said = etag.strip('"')
    if "-" in said or len(said) != MD5_DIGITS:
        return True
    with file.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest() == said
