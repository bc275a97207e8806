"""What is known of an artifact: its manifest in the store, and what passes between stages."""

from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field


def _inside(path: str) -> str:
    # A manifest comes from a shared server: it must not name a place outside the folder.
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"a stored path must lie inside its artifact: {path!r} does not")
    return path


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RelativePath = Annotated[str, AfterValidator(_inside)]
# NaN is a metric too: plain JSON would make it null, and the record unreadable.
_FROZEN = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class StoredFile(BaseModel):
    """One file of an artifact; its content lies at blobs/<sha256>."""

    model_config = _FROZEN

    path: RelativePath
    """Where it belongs below the artifact's folder, with forward slashes."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256


class Record(BaseModel):
    """The manifest of an artifact."""

    model_config = _FROZEN

    kind: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    key: Sha256
    files: tuple[StoredFile, ...]
    inputs: dict[str, str]
    """Role to the key (or the identity of a resolved source) of what it was made from."""
    section: dict[str, Any]
    """The part of the recipe that made it."""
    versions: dict[str, str]
    stage_version: int
    licence: str = ""
    metrics: dict[str, float] = {}
    created: Annotated[AwareDatetime, AfterValidator(_utc)]

    @property
    def size_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        """Where the manifest lies in the store."""
        return manifest_name(self.kind, self.key)


def manifest_name(kind: str, key: str) -> str:
    """Return where the manifest of an artifact lies in a store."""
    return f"artifacts/{kind}/{key}.json"


def blob_name(sha256: str) -> str:
    """Return where the content with this hash lies in a store."""
    return f"blobs/{sha256}"
