"""Say what the trials of a search for the intrinsic dimension come to."""

import json
from pathlib import Path

from stillroom.intrinsic_dimension.plot import write_plot
from stillroom.intrinsic_dimension.search import Dimension, ModelSize, Search, Trial, conclude
from tasks.trials import PLOT, RESULT, search_of
from tasks.work.bench import Bench, Result
from tasks.work.run_trial import TRIAL


def work(bench: Bench) -> Result:
    """Write the curve and the dimension with its interval, as JSON and as a plot."""
    section = bench.section
    search = search_of(section, section["task"], bench.order.seed)
    found = _conclude(search, list(bench.inputs.values()), bench.order.seed)
    (bench.output / RESULT).write_text(json.dumps(found.as_json(), indent=1, sort_keys=True))
    write_plot(found, bench.output / PLOT)
    licence = next(iter(bench.records.values())).licence
    return Result(licence=licence, metrics=_metrics(found))


def _conclude(search: Search, folders: list[Path], seed: int) -> Dimension:
    facts = [json.loads((folder / TRIAL).read_text()) for folder in folders]
    finished = {Trial(**fact["trial"]): float(fact["score"]) for fact in facts}
    return conclude(search, finished, ModelSize(**facts[0]["size"]), seed=seed)


def _metrics(found: Dimension) -> dict[str, float]:
    """Return the figures that are numbers; what was not reached has none."""
    low, high = found.interval
    perhaps = {
        "intrinsic_dimension": found.dimension,
        "intrinsic_dimension_low": low,
        "intrinsic_dimension_high": high,
        "suggested_lora_rank": found.lora_rank,
        "untrained_score": found.untrained,
    }
    metrics = {name: float(value) for name, value in perhaps.items() if value is not None}
    return metrics | {
        "reached": float(found.reached),
        "full_score": found.full,
        "parameters": float(found.parameters),
        "trials": float(found.trials),
    }
