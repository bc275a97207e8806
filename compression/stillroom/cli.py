"""The command `stillroom`: what someone needs who only uses the models."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import SourceError
from stillroom.exit_codes import ended
from stillroom.remote_code import has_own_code, trusting_code

FORMATS = ("gptq", "gptq_v2", "auto-gptq", "compressed-tensors", "gguf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 with one line for an error to act on, or 3 for a defect."""
    options = _parser().parse_args(arguments)
    return ended(lambda: options.run(options) or 0, "stillroom:", OSError)


def _pull(options: argparse.Namespace) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Without a bound of our own, MLflow retries an unreachable server for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    from stillroom.pull import pull

    with trusting_code(options.trust_remote_code):
        pull(options.model, options.folder, merged=options.merged, tracking_uri=options.tracking)
    print(_hint(options.folder))


def _export(options: argparse.Namespace) -> None:
    from stillroom.quantization.formats.convert import check_export, export_folder

    written = export_folder(options.folder, options.target, options.format)
    print(f"{written} written as {options.format}", flush=True)
    if options.no_check:
        return
    try:
        with trusting_code(options.trust_remote_code):
            check = check_export(options.folder, written)
    except SourceError as error:
        print(f"its logits were not compared: {error}")
        return
    print(
        f"loaded afresh, its logits differ by {check.relative:.1e} of the largest logit at most "
        f"({check.max_difference:.3g} of {check.max_logit:.3g}, float32, 64 random tokens)"
    )


def _inspect(options: argparse.Namespace) -> None:
    from stillroom.distillation.inspection import inspect_cache, report_lines

    for line in report_lines(inspect_cache(options.folder)):
        print(line)


def _hint(folder: Path) -> str:
    if (folder / "adapter").is_dir():
        return f"base and adapter verified; from_pretrained('{folder / 'adapter'}') loads both"
    trust = ", trust_remote_code=True" if has_own_code(folder) else ""
    return f"verified; from_pretrained('{folder}'{trust}) loads it"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillroom",
        description="Fetch small models that Stillroom made, write them in other formats, and "
        "measure teacher caches.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pull(commands)
    _add_export(commands)
    _add_inspect(commands)
    return parser


def _add_pull(commands: Any) -> None:
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
    _add_trust(pull, "with --merged")
    pull.set_defaults(run=_pull)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a quantized model in another format, and compare its logits",
        description="Write a GPTQ checkpoint in another format: version 1 or 2 of its own, a "
        "folder for auto-gptq, compressed-tensors (vLLM, transformers) or GGUF (llama.cpp). The "
        "result is loaded afresh and its logits compared; of a failed export nothing is left.",
    )
    export.add_argument("folder", type=Path, help="a GPTQ checkpoint, such as pull leaves")
    export.add_argument(
        "target", type=Path, help="a new or empty folder; for gguf also a file that ends in .gguf"
    )
    export.add_argument("--format", choices=FORMATS, required=True)
    export.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare logits, which takes the memory of both models",
    )
    _add_trust(export, "to compare logits")
    export.set_defaults(run=_export)


def _add_trust(command: Any, when: str) -> None:
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help=f"run Python code that the model brings along, {when}: only code that you have read",
    )


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="measure a teacher cache",
        description="Verify a teacher cache and print what it holds: bytes a token, mass covered, "
        "entropy, and the bias of its targets against its audit rows. In a clone of the pipeline, "
        "`python -m flows store fetch KEY FOLDER` takes it out of the store.",
    )
    inspect.add_argument("folder", type=Path, help="a folder with cache.json")
    inspect.set_defaults(run=_inspect)


if __name__ == "__main__":
    sys.exit(main())
