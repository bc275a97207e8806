"""Small artifacts for the tests of the store."""

import os
from pathlib import Path

from tasks.store.record import Record
from tasks.store.store import ArtifactStore

KEY = "ab" * 32
OTHER_KEY = "cd" * 32
CONTENTS = {"config.json": b"{}", "weights/model.safetensors": bytes(range(256)) * 40, "empty": b""}


def write_files(folder: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def add(
    store: ArtifactStore,
    folder: Path,
    *,
    key: str = KEY,
    metrics: dict[str, float] | None = None,
) -> Record:
    return store.add(
        folder,
        kind="model",
        key=key,
        inputs={"data": OTHER_KEY},
        section={"bits": 4, "layers": [0, 2]},
        versions={"torch": "2.13.0"},
        licence="apache-2.0",
        metrics=metrics,
        stage_version=1,
    )


def damage(store: ArtifactStore, name: str, *, truncate: bool = False) -> None:
    content = store.backend.read(name)
    assert content
    changed = content[:-1] if truncate else bytes([content[0] ^ 1]) + content[1:]
    store.backend.replace(name, changed)


def random_bytes(count: int) -> bytes:
    return os.urandom(count)
