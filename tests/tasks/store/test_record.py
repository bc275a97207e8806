"""What a record holds and refuses."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.store.record import Record, StoredFile

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)  # fmt: skip


def record(**changed: object) -> Record:
    fields: dict[str, object] = {
        "kind": "model",
        "key": "ab" * 32,
        "files": (StoredFile(path="a/b", size=1, sha256="cd" * 32),),
        "inputs": {},
        "section": {},
        "versions": {},
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "stage_version": 1,
    }
    return Record.model_validate(fields | changed)


@settings(deadline=None, max_examples=50)
@given(
    section=st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3),
    metrics=st.dictionaries(st.text(max_size=5), st.floats(), max_size=3),
)
def test_a_record_survives_its_json(section: dict[str, object], metrics: dict[str, float]) -> None:
    made = record(section=section, metrics=metrics)
    text = made.model_dump_json()
    assert Record.model_validate_json(text).model_dump_json() == text


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b", ".."])
def test_a_path_that_leaves_the_artifact_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="inside"):
        StoredFile(path=path, size=1, sha256="cd" * 32)


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "ab"},
        {"key": "AB" * 32},
        {"kind": "../model"},
        {"kind": ""},
        {"created": datetime(2026, 1, 2)},
        {"files": [{"path": "a", "size": -1, "sha256": "cd" * 32}]},
    ],
)
def test_what_cannot_be_an_artifact_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        record(**changed)


def test_a_record_is_in_utc_and_does_not_change() -> None:
    made = record(created=datetime(2026, 1, 2, 1, tzinfo=timezone(timedelta(hours=1))))
    assert made.created == datetime(2026, 1, 2, tzinfo=UTC)
    assert made.created.tzinfo is UTC
    assert made.size_bytes == 1
    with pytest.raises(ValidationError, match="frozen"):
        made.kind = "data"  # type: ignore[misc]
