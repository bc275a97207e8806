"""The commands `store ls`, `store fetch`, `store verify` and `store gc`."""

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stillroom.errors import StoreError
from stillroom.exit_codes import REFUSED
from tasks.store.collect import CollectionPlan, collect, plan_collection
from tasks.store.store import ArtifactStore


def add_store_commands(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add `store ls|fetch|verify|gc` to a command line."""
    store = subparsers.add_parser("store", help="look at, verify and clean the artifact store")
    commands = store.add_subparsers(dest="store_command", required=True, metavar="COMMAND")
    commands.add_parser("ls", help="list the artifacts")
    fetch = commands.add_parser("fetch", help="write an artifact's files into a folder, verified")
    fetch.add_argument("key", help="the first characters of its key, as `store ls` shows them")
    fetch.add_argument("folder", type=Path, help="a new or empty folder; its files are read-only")
    verify = commands.add_parser("verify", help="find what is missing or damaged")
    verify.add_argument("--shallow", action="store_true", help="compare sizes, read no content")
    verify.add_argument(
        "--repair", action="store_true", help="remove what is broken, so that a rerun makes it"
    )
    collection = commands.add_parser("gc", help="remove what nobody needs")
    collection.add_argument("--dry-run", action="store_true", help="only say what would go")
    collection.add_argument(
        "--min-age-days",
        type=_days,
        default=7.0,
        metavar="DAYS",
        help="spare what is younger (default: 7 days)",
    )


def run_store_command(
    args: argparse.Namespace, store: ArtifactStore, registered: Callable[[], set[str]]
) -> int:
    """Do what the parsed `args` ask, print the outcome, and return the exit code.

    Args:
        args: what a parser with `add_store_commands` returned.
        store: the store.
        registered: returns the keys of registered artifacts; asked by `gc` alone.
    """
    match args.store_command:
        case "ls":
            return _list(store)
        case "fetch":
            return _fetch(store, args.key, args.folder)
        case "verify":
            return _verify(store, deep=not args.shallow, repair=args.repair)
        case _:
            min_age = timedelta(days=args.min_age_days)
            return _collect(store, registered, min_age, dry_run=args.dry_run)


def _list(store: ArtifactStore) -> int:
    records = sorted(store.records(), key=lambda record: (record.kind, record.created))
    rows = [
        (
            record.kind,
            record.key[:12],
            readable_size(record.size_bytes),
            record.created.strftime("%Y-%m-%d %H:%M"),
            str(len(record.files)),
        )
        for record in records
    ]
    _print_table(("kind", "key", "size", "created (UTC)", "files"), rows)
    # Contents that several artifacts share are stored, and counted, once.
    contents = {file.sha256: file.size for record in records for file in record.files}
    total = readable_size(sum(contents.values()))
    print(f"{_count(len(records), 'artifact')}, {total} in {store.url}")
    return 0


def _fetch(store: ArtifactStore, key: str, folder: Path) -> int:
    found = [record for record in store.records() if record.key.startswith(key)]
    if len(found) != 1:
        raise StoreError(
            f"expected the beginning of one artifact's key: {_count(len(found), 'artifact')} in "
            f"{store.url} begin with {key!r}; `python -m flows store ls` lists them"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is there already and not empty: give a new or empty folder")
    with store.lease(found[0].key):
        store.fetch(found[0], folder)
    print(f"{found[0].kind} {found[0].key[:12]} verified and written to {folder}")
    return 0


def _verify(store: ArtifactStore, *, deep: bool, repair: bool) -> int:
    problems = list(store.verify(deep=deep))
    for problem in problems:
        print(f"{problem.name}: {problem.text}")
        if repair and not store.repair(problem):
            print(f"{problem.useless[0]}: stays, as it has been written anew meanwhile")
    if not problems:
        extent = "every file has its hash" if deep else "every file has its size"
        print(f"{store.url} is sound: {extent}")
        return 0
    advice = "removed: run the recipe again" if repair else "run again with --repair to remove them"
    print(f"{_count(len(problems), 'problem')} in {store.url}; {advice}")
    return REFUSED


def _collect(
    store: ArtifactStore, registered: Callable[[], set[str]], min_age: timedelta, *, dry_run: bool
) -> int:
    now = datetime.now(UTC)
    plan = plan_collection(store, registered, min_age, now)
    _print_plan(plan)
    if dry_run:
        print(f"{readable_size(plan.bytes_freed)} would be freed in {store.url}")
    else:
        print(f"{readable_size(collect(store, plan, now))} freed in {store.url}")
    return 0


def _print_plan(plan: CollectionPlan) -> None:
    rows = [(r.kind, r.key[:12], readable_size(r.size_bytes)) for r in plan.artifacts]
    rows += [("partial", key[:12], readable_size(size)) for key, size in plan.partials]
    if rows:
        _print_table(("to remove", "key", "size"), rows)
    print(
        f"to remove: {_count(len(plan.artifacts), 'artifact')}, {_count(len(plan.blobs), 'blob')}, "
        f"{_count(len(plan.partials), 'partial')}, {_count(len(plan.drafts), 'draft')}"
    )
    for spared in plan.spared:
        print(f"spared: {spared.count} {spared.what} ({spared.reason})")


def readable_size(size: int) -> str:
    """Return bytes as people write them, in powers of 1000."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 36500:
        raise argparse.ArgumentTypeError(f"expected days, 0 or more: {text} came")
    return days


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        )
