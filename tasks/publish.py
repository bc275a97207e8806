"""Register the result in MLflow, and move the alias if every gate passed and nobody is asked."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from stillroom.config import IntrinsicDimension, Recipe
from stillroom.contents import Task
from stillroom.evaluation.gates import GateResult
from tasks.approval import Answer, Question, ask, question_of, settle
from tasks.explain import plainly
from tasks.journal import Journal
from tasks.registry import (
    Candidate,
    Registered,
    champion,
    find_registered,
    move_alias,
    register_adapter,
    register_base,
    tag_gates,
)
from tasks.store.record import Record


@dataclass(frozen=True)
class Publication:
    """What was registered; where someone is asked first: the question, and the answer once there.

    Without a question the alias is where the gates say.
    """

    versions: tuple[Registered, ...] = ()
    question: Question | None = None
    answer: Answer | None = None


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
@plainly
def register_models(
    recipe: Recipe,
    bases: dict[str, Record],
    adapters: dict[str, Record],
    gates: list[GateResult],
    compared_with: Registered | None,
    journal: Journal,
) -> Publication:
    """Register the bases and each adapter as models of their own.

    `bases` come by their full names, the one that the adapters sit on first. A question that was
    answered before is not asked again.

    Raises:
        MismatchError: another champion came while this one was being judged.
        ServiceUnreachableError: MLflow stopped answering; a rerun goes on.
    """
    publish = recipe.publish
    if publish is None:
        return Publication()
    client, failed = journal.client, [gate.name for gate in gates if not gate.passed]
    rivals = {publish.name: compared_with}
    own = {f"{publish.name}-{name}": adapter for name, adapter in adapters.items()}
    registered: list[Registered] = []
    for name, record in (bases | own).items():
        if name not in rivals:
            rivals[name] = champion(client, name, publish.alias)
        sits_on = registered[0] if name in own else None
        registered.append(_register(name, record, recipe.task, sits_on, journal))
    for version in registered:
        tag_gates(client, version, failed)
    question, answer = None, None
    if publish.approval and not failed:
        moves = [(version, rivals[version.name]) for version in registered]
        question = question_of(client, publish.alias, moves, journal.parent.run_id)
        answer = ask(client, question) if question else None
        if question and answer:
            settle(client, question, answer)
    elif not failed:
        for version in registered:
            move_alias(client, version, publish.alias, rivals[version.name])
    logger = get_run_logger()
    for version in registered:
        logger.info("%s %s", version.uri, "registered" if version.created else "was there already")
    return Publication(tuple(registered), question, answer)


@task(name="approve", task_run_name="approve", cache_policy=NO_CACHE, persist_result=False)
@plainly
def settle_publication(publication: Publication, answer: Answer, journal: Journal) -> Publication:
    """Record the answer, and move the alias if it approves.

    Raises:
        MismatchError: another champion came since the comparison.
        ServiceUnreachableError: MLflow stopped answering; a rerun goes on.
    """
    assert publication.question is not None
    settle(journal.client, publication.question, answer)
    get_run_logger().info("%s It was %s", publication.question.sentence, answer.sentence)
    return replace(publication, answer=answer)


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
@plainly
def register_subspace(
    recipe: IntrinsicDimension, base: Record, subspace: Record, journal: Journal
) -> list[Registered]:
    """Register a measured model, and a trained subspace on it; return their versions.

    The alias moves to the subspace, which reaches its share; nobody has gated the base.

    Raises:
        MismatchError: another champion came meanwhile.
        ServiceUnreachableError: MLflow stopped answering; a rerun goes on.
    """
    publish = recipe.publish
    assert publish is not None
    first = _register(publish.name, base, recipe.task, None, journal)
    full = f"{publish.name}-subspace"
    versions = [first, _register(full, subspace, recipe.task, first, journal)]
    rival = champion(journal.client, full, publish.alias)
    move_alias(journal.client, versions[1], publish.alias, rival)
    for version in versions:
        get_run_logger().info(
            "%s %s", version.uri, "registered" if version.created else "was there already"
        )
    return versions


def current_champion(recipe: Recipe, journal: Journal) -> Registered | None:
    """Return the version that bears the recipe's alias now; None where there is none."""
    if recipe.publish is None:
        return None
    return champion(journal.client, recipe.publish.name, recipe.publish.alias)


def _register(
    name: str, record: Record, task_name: Task, base: Registered | None, journal: Journal
) -> Registered:
    found = find_registered(journal.client, name, record.key, base.uri if base else None)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="stillroom-") as scratch:
        folder = journal.store.fetch(record, Path(scratch) / "model")
        candidate = Candidate(
            name=name,
            folder=folder,
            task=task_name,
            artifact_key=record.key,
            run_id=journal.parent.run_id,
            licence=record.licence,
            metrics=record.metrics,
        )
        if base is None:
            return register_base(journal.client, candidate)
        return register_adapter(journal.client, candidate, base)
