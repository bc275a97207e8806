"""The question before the alias moves, and its answer, as the registry keeps them."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

import flows.__main__
import tasks.approval
from flows.approve import _table
from stillroom.errors import MismatchError, SourceError
from stillroom.evaluation.report_data import ReportData
from tasks.approval import Answer, Question, ask, pending_question, question_of, settle
from tasks.registry import Registered, champion, move_alias, register_base, tag_gates
from tests.registering import Place, llama_folder, register_pair

# MLflow uses what SQLAlchemy will drop, and peft what transformers will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload``"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]

YES = Answer(True, "small enough", "ada", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
NO = replace(YES, approve=False, comment="too dear")


@pytest.fixture
def pair(place: Place) -> tuple[Registered, Registered]:
    """A base and an adapter whose gates passed."""
    registered = register_pair(place)
    for version in registered:
        tag_gates(place.client, version, [])
    return registered


def question(place: Place, pair: tuple[Registered, Registered], run: str = "") -> Question:
    moves = [(each, champion(place.client, each.name, "champion")) for each in pair]
    asked = question_of(place.client, "champion", moves, run or place.parent.run_id)
    assert asked is not None
    return asked


def rival(place: Place, key: str = "c" * 64) -> Registered:
    """Another version of the base becomes champion."""
    made = register_base(place.client, place.candidate("tiny", llama_folder(place.root), key))
    place.client.set_registered_model_alias("tiny", "champion", made.version)
    return made


def tags(place: Place, version: Registered) -> dict[str, str]:
    found: dict[str, str] = place.client.get_model_version(version.name, version.version).tags
    return found


def bearers(place: Place) -> list[str]:
    found = [champion(place.client, name, "champion") for name in ("tiny", "tiny-law")]
    return [version.version if version else "" for version in found]


def test_asked_is_pending_and_moves_nothing(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    assert ask(place.client, question(place, pair)) is None
    for version in pair:
        assert tags(place, version)["stillroom.approval"] == "pending"
        assert tags(place, version)["stillroom.compared_with"] == "none"
    assert bearers(place) == ["", ""]
    waiting = pending_question(place.client, "models:/tiny-law/1")
    assert waiting.versions == ("models:/tiny/1", "models:/tiny-law/1")
    assert (waiting.key, waiting.run_id) == (question(place, pair).key, place.parent.run_id)


def test_approved_moves_all_and_is_recorded(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    settle(place.client, asked, YES)
    assert bearers(place) == ["1", "1"]
    run = place.client.get_run(place.parent.run_id).data.tags
    for where in (tags(place, pair[0]), tags(place, pair[1]), run):
        assert where["stillroom.approval"] == "approved"
        assert where["stillroom.approval_comment"] == "small enough"
        assert where["stillroom.approval_by"] == "ada"
        assert where["stillroom.approval_time"] == "2026-01-02T03:04:05+00:00"
    moves: list[Any] = [(each, champion(place.client, each.name, "champion")) for each in pair]
    assert question_of(place.client, "champion", moves, "later") is None
    with pytest.raises(MismatchError, match="@champion already: approved by ada, 2026-01-02"):
        pending_question(place.client, "models:/tiny/1")


def test_refused_is_remembered_until_another_champion_comes(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    settle(place.client, asked, NO)
    assert bearers(place) == ["", ""]
    assert ask(place.client, question(place, pair, run="later")) == NO

    rival(place)
    assert ask(place.client, question(place, pair, run="later")) is None
    assert tags(place, pair[0])["stillroom.approval"] == "pending"
    assert "stillroom.approval_comment" not in tags(place, pair[0])


def test_refused_can_be_approved_after_all(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    settle(place.client, asked, NO)
    settle(place.client, pending_question(place.client, "models:/tiny/1"), replace(YES, comment=""))
    assert bearers(place) == ["1", "1"]
    assert tags(place, pair[0])["stillroom.approval_comment"] == ""


def test_champion_that_came_since_makes_it_another_question(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    rival(place)
    with pytest.raises(MismatchError, match=r"compared with none .* models:/tiny/2 by now: run"):
        settle(place.client, pending_question(place.client, "models:/tiny/1"), YES)
    assert tags(place, pair[0])["stillroom.approval"] == "pending"
    assert bearers(place) == ["2", ""]

    again = question(place, pair)
    assert again.key != asked.key
    assert "asked before about a comparison with none" in again.sentence
    assert "asked before" not in question(place, pair, run="later").sentence
    ask(place.client, again)
    settle(place.client, pending_question(place.client, "models:/tiny/1"), YES)
    assert bearers(place) == ["1", "1"]


def test_approval_that_a_crash_cut_short_is_gone_through_with(
    place: Place, pair: tuple[Registered, Registered], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(client: Any, version: Registered, *rest: Any) -> None:
        if version.name == "tiny-law":
            raise KeyboardInterrupt
        move_alias(client, version, *rest)

    asked = question(place, pair)
    ask(place.client, asked)
    with monkeypatch.context() as broken:
        broken.setattr(tasks.approval, "move_alias", crash)
        with pytest.raises(KeyboardInterrupt):
            settle(place.client, asked, YES)
    assert bearers(place) == ["1", ""]

    # Both ways: a rerun knows the answer, and the command goes on.
    assert ask(place.client, question(place, pair, run="later")) == YES
    settle(place.client, pending_question(place.client, "models:/tiny/1"), YES)
    assert bearers(place) == ["1", "1"]


def test_an_approval_moves_the_alias_once(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    before = rival(place)
    asked = question(place, pair)
    ask(place.client, asked)
    settle(place.client, asked, YES)
    assert bearers(place) == ["1", "1"]

    place.client.set_registered_model_alias("tiny", "champion", before.version)
    assert ask(place.client, question(place, pair[:1], run="later")) is None
    assert tags(place, pair[0])["stillroom.approval"] == "pending"
    assert "stillroom.approval_used" not in tags(place, pair[0])
    assert bearers(place) == ["2", "1"]
    settle(place.client, pending_question(place.client, "models:/tiny/1"), YES)
    assert bearers(place) == ["1", "1"]


@pytest.mark.parametrize("gone", ["deleted", "removed"])
def test_an_approval_outlasts_the_run_that_asked(
    gone: str, place: Place, pair: tuple[Registered, Registered]
) -> None:
    run = place.parent.run_id if gone == "deleted" else "0" * 32
    ask(place.client, question(place, pair, run))
    place.client.delete_run(place.parent.run_id)
    settle(place.client, pending_question(place.client, "models:/tiny/1"), YES)
    assert bearers(place) == ["1", "1"]
    assert tags(place, pair[1])["stillroom.approval"] == "approved"


def test_answer_that_a_crash_cut_short_is_none(
    place: Place, pair: tuple[Registered, Registered], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    write = place.client.set_model_version_tag

    def crash(name: str, version: str, tag: str, value: str) -> None:
        if tag == "stillroom.approval_time":
            raise KeyboardInterrupt
        write(name, version, tag, value)

    with monkeypatch.context() as broken:
        broken.setattr(place.client, "set_model_version_tag", crash)
        with pytest.raises(KeyboardInterrupt):
            settle(place.client, asked, YES)
    assert ask(place.client, question(place, pair)) is None
    assert tags(place, pair[0])["stillroom.approval"] == "pending"


def test_what_cannot_be_approved(place: Place, pair: tuple[Registered, Registered]) -> None:
    with pytest.raises(SourceError, match="models:/tiny/9"):
        pending_question(place.client, "models:/tiny/9")
    with pytest.raises(SourceError, match="expected models:/NAME"):
        pending_question(place.client, "tiny")
    with pytest.raises(MismatchError, match=r"without publish\.approval"):
        pending_question(place.client, "models:/tiny/1")
    ask(place.client, question(place, pair))
    tag_gates(place.client, pair[0], ["kl", "size"])
    with pytest.raises(MismatchError, match="these failed: kl, size"):
        pending_question(place.client, "models:/tiny/1")
    with pytest.raises(MismatchError, match=r"models:/tiny/1: expected .* these failed: kl, size"):
        pending_question(place.client, "models:/tiny-law/1")


def test_a_version_that_was_deleted_since_is_named(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    ask(place.client, question(place, pair))
    place.client.delete_model_version("tiny-law", "1")
    with pytest.raises(SourceError, match="models:/tiny-law/1, which was to be answered for"):
        pending_question(place.client, "models:/tiny/1")


def test_a_question_can_be_answered_where_its_table_cannot_be_read(
    place: Place,
    pair: tuple[Registered, Registered],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask(place.client, question(place, pair))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    assert flows.__main__.main(["approve", "models:/tiny/1"]) == 0  # it has left no report
    said = capsys.readouterr().out
    assert f"the table of MLflow's run {place.parent.run_id} cannot be read from here" in said
    assert bearers(place) == ["1", "1"]


def test_a_report_that_was_cut_off_hinders_no_answer(place: Place) -> None:
    file = place.root / "report.json"
    file.write_text(ReportData("tiny", "now", ()).to_json()[:40])
    place.client.log_artifact(place.parent.run_id, str(file))
    assert "cannot be read from here: 1 validation error" in _table(
        place.client, place.parent.run_id
    )


def test_secrets_stay_out_of_what_is_kept(
    place: Place, pair: tuple[Registered, Registered]
) -> None:
    asked = question(place, pair)
    ask(place.client, asked)
    settle(place.client, asked, replace(NO, comment="see https://me:hunter2@example.org"))
    run = place.client.get_run(place.parent.run_id).data.tags
    assert "hunter2" not in str([tags(place, each) for each in pair]) + str(run)
