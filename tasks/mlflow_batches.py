"""What a run is told, in the form and the portions that MLflow takes."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from stillroom.redaction import redact

# Bounds of MLflow's log_batch.
LONGEST_VALUE = 500
PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 900


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested section as parameters: dotted names, credentials taken out, values cut."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                flat |= flatten({str(item.get("name", i)): item}, f"{name}.")
        else:
            text = redact(str(value))
            cut = len(text) > LONGEST_VALUE
            flat[_allowed(name)] = f"{text[: LONGEST_VALUE - 1]}…" if cut else text
    return flat


def log_batches(
    client: Any,
    run_id: str,
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    history: Iterable[tuple[int, Mapping[str, float]]],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log parameters, metrics and their curves, and tags, in as few requests as MLflow takes."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    points = [Metric(_allowed(name), _number(value), now, 0) for name, value in metrics.items()]
    points += [
        Metric(_allowed(name), _number(value), now, step)
        for step, measured in history
        for name, value in measured.items()
    ]
    parameters = [Param(name, value) for name, value in params.items()]
    run_tags = [RunTag(name, value) for name, value in (tags or {}).items()]
    param_parts = _parts(parameters, PARAMS_AT_ONCE)
    metric_parts = _parts(points, METRICS_AT_ONCE)
    for i in range(max(len(param_parts), len(metric_parts), 1 if run_tags else 0)):
        client.log_batch(
            run_id,
            params=param_parts[i] if i < len(param_parts) else [],
            metrics=metric_parts[i] if i < len(metric_parts) else [],
            tags=run_tags if i == 0 else [],
        )


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _allowed(name: str) -> str:
    """Return `name` with what MLflow refuses in the names of metrics and parameters replaced."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:250]


def _number(value: float) -> float:
    # MLflow stores infinity as the largest float, which reads like a measurement.
    return float("nan") if math.isinf(value) else float(value)
