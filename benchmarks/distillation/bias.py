"""Bias and calibration error of each kind of cache against dense logits of the same positions."""

from dataclasses import replace
from typing import Any

from benchmarks.claims import at_least, at_most, write_measure
from benchmarks.distillation.caches import BIASED, DEFAULT, KINDS
from benchmarks.distillation.places import bench_folder, measure_path
from benchmarks.distillation.work import load_teacher, train_rows
from benchmarks.text import text_source
from stillroom.distillation.inspection import TargetError, inspect_cache
from stillroom.distillation.teacher_cache import capture

ROWS = 16
ERRORS = 3.0  # standard errors, within which what has no bias lies nearly always


def measure_bias() -> None:
    """Capture a few rows in each kind, with dense logits beside them, and compare."""
    found = {name: _error(name) for name in KINDS}
    rows: list[dict[str, Any]] = [
        {
            "targets": name,
            "bias": error.likely_bias,
            "standard_error": error.likely_bias_standard_error,
            "calibration_error": error.calibration_error,
            "by_chance": error.calibration_noise,
        }
        for name, error in found.items()
    ]
    claims = [
        at_most(
            "bias of the default's targets, either way, in standard errors",
            ERRORS,
            abs(_in_errors(found[DEFAULT])),
        ),
        at_least(
            f"bias of the {BIASED}'s targets, in standard errors", ERRORS, _in_errors(found[BIASED])
        ),
    ]
    positions = found[DEFAULT].positions
    write_measure(measure_path("bias"), claims, text=text_source(), positions=positions, rows=rows)


def _error(name: str) -> TargetError:
    rows = train_rows().take(slice(0, ROWS))
    folder = bench_folder() / "caches" / f"audited-{name}".replace(" ", "-")
    options = replace(KINDS[name], audit_rows=ROWS)
    capture(load_teacher(), rows, folder, options, tokenizer_hash=rows.tokenizer_hash)
    error = inspect_cache(folder).audit
    assert error is not None
    return error


def _in_errors(error: TargetError) -> float:
    return error.likely_bias / error.likely_bias_standard_error
