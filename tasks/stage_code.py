"""A fingerprint of the code behind each stage, so that a change of it is not overlooked.

A stage's key holds its version, not its code: a comment must not throw away a day of work, and a
changed formula must. `python -m tasks.stage_code` compares the code with stage_code.json and says
what has changed; raise the stage's version in stages.py if its results change, then record the code
with `--record`, or with `--waive "why the results stay the same"`.
"""

import argparse
import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tasks.stages import STAGES, Stage

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).with_suffix(".json")
FOLDERS = {"stillroom": ROOT / "compression", "tasks": ROOT}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
# What these hold reaches no artifact: errors, how work is started, watched, kept and tracked.
WITHOUT_EFFECT = (
    "stillroom.errors",
    "stillroom.progress",
    "stillroom.checkpoint",
    "stillroom.config",
    "tasks.mlflow_batches",
    "tasks.registered",
    "tasks.registry",
    "tasks.settings",
    "tasks.sources",
    "tasks.stages",
    "tasks.store",
    "tasks.tracking",
)


def code_of(stage: Stage) -> str:
    """Return a hash of the modules that a stage's work imports, comments and docstrings apart."""
    whole = hashlib.sha256()
    for module, file in sorted(_closure(stage.work).items()):
        whole.update(f"{module}\0{_meaning(file)}\n".encode())
    return whole.hexdigest()[:16]


def changed_stages(recorded: dict[str, Any]) -> list[str]:
    """Return the names of stages whose code is not the recorded one at their version."""
    return [
        stage.name
        for stage in STAGES
        if recorded.get(stage.name, {}).get("code") != code_of(stage)
        or recorded[stage.name]["version"] != stage.version
    ]


def read_recorded() -> dict[str, Any]:
    """Return what stage_code.json holds, by stage."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return recorded


def record(recorded: dict[str, Any], waiver: str | None) -> dict[str, Any]:
    """Return the record brought up to date.

    Raises:
        SystemExit: code has changed at the same version, and no waiver says why that is right.
    """
    fresh = dict(recorded)
    for stage in STAGES:
        before = recorded.get(stage.name, {"version": 0, "waivers": []})
        code = code_of(stage)
        waivers = before["waivers"] if before["version"] == stage.version else []
        if before["version"] == stage.version and before["code"] != code:
            if not waiver:
                sys.exit(f"{stage.name}: same version, other code; raise the version or --waive")
            waivers = [*waivers, waiver]
        fresh[stage.name] = {"version": stage.version, "code": code, "waivers": waivers}
    return fresh


def main() -> int:
    """Compare, or record; return 1 where a stage has changed unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="record the code of new versions")
    parser.add_argument("--waive", metavar="WHY", help="record code that gives the same results")
    options = parser.parse_args()
    recorded = read_recorded()
    if options.record or options.waive:
        fresh = record(recorded, options.waive)
        RECORDED.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n")
        return 0
    changed = changed_stages(recorded)
    print("\n".join(changed) or "no stage has changed")
    return 1 if changed else 0


def _closure(module: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in found or file is None or name.startswith(WITHOUT_EFFECT):
            continue
        found[name] = file
        waiting += _imports(file)
    return found


def _file_of(module: str) -> Path | None:
    folder = FOLDERS.get(module.partition(".")[0])
    if folder is None:
        return None
    path = folder / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _imports(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _meaning(file: Path) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


if __name__ == "__main__":
    sys.exit(main())
