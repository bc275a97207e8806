"""The command `stillroom`: what someone needs who only uses the models."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stillroom.errors import StillroomError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 with one line on stderr."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Without a bound of our own, MLflow retries an unreachable server for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    from stillroom.pull import pull

    try:
        pull(options.model, options.folder, merged=options.merged, tracking_uri=options.tracking)
    except (StillroomError, OSError) as error:
        print(f"stillroom: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(_hint(options.folder))
    return 0


def _hint(folder: Path) -> str:
    if (folder / "adapter").is_dir():
        return f"base and adapter verified; from_pretrained('{folder / 'adapter'}') loads both"
    return f"verified; from_pretrained('{folder}') loads it"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillroom", description="Fetch small models that Stillroom made."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pull = commands.add_parser(
        "pull",
        help="fetch a registered model, verified",
        description="Fetch a registered model into a folder that from_pretrained loads. Every "
        "SHA-256 is checked; on any failure nothing is left behind.",
    )
    pull.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    pull.add_argument("folder", type=Path, help="a new or empty folder")
    pull.add_argument(
        "--merged", action="store_true", help="leave one dense model, the adapter merged in"
    )
    pull.add_argument(
        "--tracking",
        metavar="URI",
        default=None,
        help="MLflow's address; without it MLFLOW_TRACKING_URI",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
