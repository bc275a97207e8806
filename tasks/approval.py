"""The question whether versions that passed their gates may bear the alias, and its answer.

Both are tags of the registered versions: they outlast the run that asked and Prefect's database.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from stillroom.errors import MismatchError, SourceError
from stillroom.pull import find, parse_reference, reaching
from stillroom.redaction import redact
from tasks.registry import TAG_GATES, TAG_GATES_FAILED, Registered, champion, move_alias
from tasks.tracking import TAG_KEY

TAG_APPROVAL = "stillroom.approval"
"""pending, approved or refused."""
TAG_COMPARED_WITH = "stillroom.compared_with"
TAG_ALIAS = "stillroom.approval_alias"
TAG_TOGETHER = "stillroom.approval_together"
TAG_ASKED_BY = "stillroom.approval_run_id"
TAG_COMMENT = "stillroom.approval_comment"
TAG_TIME = "stillroom.approval_time"
TAG_BY = "stillroom.approval_by"
TAG_USED = "stillroom.approval_used"
"""The alias has moved: after a rollback this answer moves it no second time."""
ANSWER_TAGS = (TAG_TIME, TAG_BY, TAG_COMMENT, TAG_USED)
"""The time makes an answer: it is written last and goes first, so that a crash leaves none half."""
PENDING, APPROVED, REFUSED = "pending", "approved", "refused"
NO_CHAMPION = "none"

Move = tuple[Registered, Registered | None]
"""A version, and the champion that it was compared with."""


@dataclass(frozen=True)
class Question:
    """May the alias move to these versions?"""

    alias: str
    moves: tuple[Move, ...]
    run_id: str
    """MLflow run that asks; its report shows what is asked."""
    earlier: str = ""
    """What this run asked a comparison with before, where another champion has come since."""

    @property
    def versions(self) -> tuple[str, ...]:
        """References of the versions."""
        return tuple(version.uri for version, _ in self.moves)

    @property
    def key(self) -> str:
        """Name of the question; with another champion it is another one."""
        text = "\n".join([self.alias, *(f"{new.uri} {_uri(old)}" for new, old in self.moves)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def sentence(self) -> str:
        """The question in words."""
        parts = [
            f"{new.uri} (compared with {old.uri})" if old else f"{new.uri} (the first to bear it)"
            for new, old in self.moves
        ]
        since = (
            f" It was asked before about a comparison with {self.earlier}: another champion has "
            "come since, and an answer to that does not count."
        )
        return f"Shall @{self.alias} move to {', '.join(parts)}?{since if self.earlier else ''}"


@dataclass(frozen=True)
class Answer:
    """What was answered, by whom and when."""

    approve: bool
    comment: str
    by: str
    time: datetime

    @property
    def verdict(self) -> str:
        """The answer in a word."""
        return APPROVED if self.approve else REFUSED

    @property
    def sentence(self) -> str:
        """The answer in words."""
        when = self.time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
        said = f": {self.comment}" if self.comment else ""
        return f"{self.verdict} by {self.by}, {when}{said}"


def question_of(client: Any, alias: str, moves: Sequence[Move], run_id: str) -> Question | None:
    """Return the question about the versions that do not bear the alias yet; None if all do."""
    open_moves = tuple((new, old) for new, old in moves if old is None or old.uri != new.uri)
    if not open_moves:
        return None
    return Question(alias, open_moves, run_id, _earlier(client, open_moves, run_id))


def ask(client: Any, question: Question) -> Answer | None:
    """Return the answer that this question was given before; else tag its versions as pending."""
    with reaching(client.tracking_uri):
        tagged = [_tags(client, new) for new, _ in question.moves]
        answers = [
            _answer_in(tags)
            for tags, (_, old) in zip(tagged, question.moves, strict=True)
            if tags.get(TAG_COMPARED_WITH) == _uri(old) and tags.get(TAG_ALIAS) == question.alias
            if TAG_USED not in tags
        ]
        known = [answer for answer in answers if answer is not None]
        if len(known) == len(question.moves):
            return min(known, key=lambda answer: answer.approve)  # a refusal of one is one of all
        for tags, (new, old) in zip(tagged, question.moves, strict=True):
            _tag_version(client, new, tags, _asked(question, old))
    return None


def settle(client: Any, question: Question, answer: Answer) -> None:
    """Record an answer with the versions and the run that asked, and do what it says.

    Raises:
        MismatchError: the champion is another one than at the comparison; nothing was recorded.
    """
    if answer.approve:
        _require_same_champions(client, question)
    said = {
        TAG_APPROVAL: answer.verdict,
        TAG_COMMENT: redact(answer.comment)[:5000],
        TAG_BY: redact(answer.by)[:500],
        TAG_TIME: answer.time.isoformat(timespec="seconds"),
    }
    with reaching(client.tracking_uri):
        for new, old in question.moves:
            _tag_version(client, new, _tags(client, new), _asked(question, old) | said)
        _tag_run(client, question.run_id, said)
    if answer.approve:
        for new, old in question.moves:
            move_alias(client, new, question.alias, old)
            with reaching(client.tracking_uri):
                client.set_model_version_tag(new.name, new.version, TAG_USED, "true")


def pending_question(client: Any, reference: str) -> Question:
    """Return the question that a registered version waits for, or was refused in.

    Raises:
        SourceError: there is no such version.
        MismatchError: nobody asked, its gates failed, or it was approved already.
    """
    version = find(client, reference)
    with reaching(client.tracking_uri):
        tags = client.get_model_version(version.name, version.version).tags
        if TAG_APPROVAL not in tags:
            raise MismatchError(
                f"{version} was registered by a recipe without publish.approval: true, so nobody "
                "asks for an approval"
            )
        moves = [_read_move(client, uri) for uri in tags[TAG_TOGETHER].split()]
    question = Question(tags[TAG_ALIAS], tuple(moves), tags[TAG_ASKED_BY])
    if not _open(client, question):
        answer = _answer_in(tags)
        how = answer.sentence if answer else "a recipe moved it without asking"
        raise MismatchError(f"{version} is @{question.alias} already: {how}")
    return question


def _earlier(client: Any, moves: Sequence[Move], run_id: str) -> str:
    with reaching(client.tracking_uri):
        for new, old in moves:
            tags = _tags(client, new)
            compared = tags.get(TAG_COMPARED_WITH, _uri(old))
            if tags.get(TAG_ASKED_BY) == run_id and compared != _uri(old):
                return compared
    return ""


def _require_same_champions(client: Any, question: Question) -> None:
    for new, old in _open(client, question):
        now = champion(client, new.name, question.alias)
        if _uri(now) != _uri(old):
            raise MismatchError(
                f"{new.uri} was compared with {_uri(old)} as @{question.alias}, which is "
                f"{_uri(now)} by now: run the recipe again to compare with that one"
            )


def _open(client: Any, question: Question) -> list[Move]:
    """Return the moves that are still to be made."""
    bearers = [champion(client, new.name, question.alias) for new, _ in question.moves]
    return [
        (new, old)
        for (new, old), bearer in zip(question.moves, bearers, strict=True)
        if _uri(bearer) != new.uri
    ]


def _asked(question: Question, old: Registered | None) -> dict[str, str]:
    return {
        TAG_COMPARED_WITH: _uri(old),
        TAG_ALIAS: question.alias,
        TAG_TOGETHER: " ".join(question.versions),
        TAG_ASKED_BY: question.run_id,
        TAG_APPROVAL: PENDING,
    }


def _tag_version(
    client: Any, version: Registered, tags: Mapping[str, str], wanted: Mapping[str, str]
) -> None:
    """Write the tags that differ, in their order; before that an earlier answer goes."""
    for name in ANSWER_TAGS:
        if name in tags:
            client.delete_model_version_tag(version.name, version.version, name)
    for name, value in wanted.items():
        if name in ANSWER_TAGS or tags.get(name) != value:
            client.set_model_version_tag(version.name, version.version, name, value)


def _tag_run(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Write tags on a run, unless it was deleted since: the versions say the same."""
    from mlflow.exceptions import MlflowException

    try:
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
    except MlflowException as error:
        # The second is what MLflow says of a run that its clean-up has not yet removed.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


def _answer_in(tags: Mapping[str, str]) -> Answer | None:
    if TAG_TIME not in tags:
        return None
    return Answer(
        tags[TAG_APPROVAL] == APPROVED,
        tags[TAG_COMMENT],
        tags[TAG_BY],
        datetime.fromisoformat(tags[TAG_TIME]),
    )


def _read_move(client: Any, uri: str) -> Move:
    name, _, version = parse_reference(uri)
    try:
        find(client, uri)
    except SourceError as error:
        raise SourceError(
            f"{uri}, which was to be answered for, is not there any more: run the recipe again"
        ) from error
    tags = client.get_model_version(name, version).tags
    if tags.get(TAG_GATES) != "passed":
        raise MismatchError(
            f"{uri}: expected a version whose gates passed, these failed: "
            f"{tags.get(TAG_GATES_FAILED, 'unknown')}; nothing can approve it"
        )
    before = tags[TAG_COMPARED_WITH]
    old = None
    if before != NO_CHAMPION:
        rival, _, number = parse_reference(before)
        old = Registered(rival, number, "", created=False)
    return Registered(name, version, tags[TAG_KEY], created=False), old


def _tags(client: Any, version: Registered) -> dict[str, str]:
    tags: dict[str, str] = client.get_model_version(version.name, version.version).tags
    return tags


def _uri(version: Registered | None) -> str:
    return version.uri if version else NO_CHAMPION
