"""A worker that knows only the store: what it leaves there is the whole cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.config import Distillation
from stillroom.data.prepare import PreparedData, save_prepared
from stillroom.distillation.teacher_cache import gather
from stillroom.errors import SourceError
from stillroom.models import save_model, tokenizer_hash
from stillroom.progress import silent
from tasks.cache_share import Share, work_share
from tasks.cache_worker import plan_capture
from tasks.stages import CACHE_TEACHER, IMPORT_MODEL, PREPARE_DATA, Order, as_json
from tasks.store.store import open_store
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Share:
    """The order of a cache whose teacher and rows are in the store of STILLROOM_HOME."""
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    store = open_store((tmp_path / "home" / "store").as_uri())
    tokenizer = tiny_tokenizer()
    save_model(tiny_llama(), tokenizer, tmp_path / "teacher")
    rows = replace(token_rows(24, 16, padding=3), tokenizer_hash=tokenizer_hash(tokenizer))
    save_prepared(PreparedData(rows, rows, rows, {}), tmp_path / "data")
    records = {
        role: store.add(
            tmp_path / role, kind=stage.kind, key=letter * 64, stage_version=1,
            inputs={}, section={}, versions={},
        )
        for role, stage, letter in (("teacher", IMPORT_MODEL, "a"), ("data", PREPARE_DATA, "b"))
    }  # fmt: skip
    section = as_json(Distillation.model_validate({"cache": {"rows_per_shard": 4}}).cache)
    order = Order(
        title="cache teacher",
        stage=CACHE_TEACHER,
        section=section | {"temperature": 1.0, "task": "causal_lm", "device": "cpu"},
        seed=0,
        inputs={role: record.key for role, record in records.items()},
    )
    return Share(order=order, records=records, run="one", threads=1)


def test_everything_is_in_the_store_afterwards(share: Share, tmp_path: Path) -> None:
    seen: list[Any] = []
    work_share(share, lambda *report: seen.append(report[:2]))
    assert seen[-1] == (24, 24)
    store = open_store((tmp_path / "home" / "store").as_uri())
    checkpoints = store.checkpoints(share.order.key)
    plan = plan_capture(share.order, {role: tmp_path / role for role in ("teacher", "data")})
    assert set(checkpoints.names()) == set(plan.pieces)

    def no_teacher() -> Any:
        raise AssertionError("a piece was left")

    gather(plan, tmp_path / "cache", checkpoints, no_teacher, progress=silent)
    assert not list((tmp_path / "home" / "scratch").iterdir())


def test_a_teacher_s_own_code_runs_where_this_machine_allows_it(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STILLROOM_ALLOW_REMOTE_CODE", raising=False)
    section = share.order.section | {"trust_remote_code": True}
    order = share.order.model_copy(update={"section": section})
    with pytest.raises(SourceError, match="STILLROOM_ALLOW_REMOTE_CODE"):
        work_share(share.model_copy(update={"order": order}), silent)


def test_what_another_worker_claimed_is_left_to_it(share: Share, tmp_path: Path) -> None:
    from tasks.store.claims import StoreClaims

    store = open_store((tmp_path / "home" / "store").as_uri())
    claims = StoreClaims(store.backend, share.order.key, share.run)
    assert claims.take("shard-00002")
    work_share(share, silent)
    plan = plan_capture(share.order, {role: tmp_path / role for role in ("teacher", "data")})
    made = set(store.checkpoints(share.order.key).names())
    assert set(plan.pieces) - made == {"shard-00002"}
