"""Gather the measurements into results.json, the page and the plot."""

from typing import Any

from benchmarks.claims import Claim
from benchmarks.distillation.places import HERE, measure_path
from benchmarks.distillation.plot import plot
from benchmarks.results import Tables, claims_of, page_of, read_measures, write_results

RESULTS = HERE / "results.json"
PAGE = HERE / "RESULTS.md"
PLOT = HERE / "distillation.png"

TABLES: Tables = {
    "targets": (
        "## Words kept and words drawn, in at most {bytes} bytes a token",
        {
            "head": "kept",
            "draws": "drawn",
            "bytes_per_token": "bytes a token",
            "squared_error": "squared error of the targets",
        },
    ),
    "caches": (
        "## What is kept of the teacher: students of {layers} layers",
        {
            "targets": "targets",
            "kl_nats": "KL to the teacher on other text, nats",
            "over_dense": "over that of dense logits",
            "standard_error": "± ",
            "bytes_per_token": "bytes a token",
        },
    ),
    "bias": (
        "## How far the targets are from dense logits, in shares of the mass\n\n"
        "Over {positions} positions. The bias is what the likely words have too much; the "
        "calibration error is the mass in the wrong bin of probability, of which targets without "
        "bias have some by chance.",
        {
            "targets": "targets",
            "bias": "bias to likely words",
            "standard_error": "± ",
            "calibration_error": "calibration error",
            "by_chance": "of it by chance",
        },
    ),
    "steps": (
        "## A step of a student of {layers} layers\n\nReading the cache takes "
        "{reading_seconds:.1e} s of it; the teacher needs {flops_teacher_over_student:.3f} of the "
        "student's operations.",
        {"teacher": "the teacher", "seconds": "seconds", "over_cached": "over a cached step"},
    ),
    "peak": (
        "## Peak memory of training a student of {layers} layers, medians of {runs}",
        {"case": "case", "gigabytes": "GB, the runtime included", "over_first": "over the first"},
    ),
    "depths": (
        "## Depth",
        {
            "layers": "layers",
            "parameters": "parameters",
            "untrained_kl_nats": "KL before training, nats",
            "kl_nats": "KL after it",
            "perplexity": "perplexity",
        },
    ),
    "sst2": (
        "## DistilBERT's claim: MiniLM and 3 of its 6 layers on SST-2, seeds: {seeds}\n\n"
        "{labelled} phrases have labels: the teacher learns from these, its student from what it "
        "says of all {all_examples}. {examples} of other sentences to measure on; the 3 layers are "
        "{speed:.2f} times as fast. ± is over sentences and seeds.",
        {
            "model": "model",
            "parameters": "parameters",
            "accuracy": "right, %",
            "lost": "lost against the teacher, points",
            "standard_error": "± ",
            "glue": "right of GLUE's 872, %",
        },
    ),
    "mixture": (
        "## Switch in small: a mixture of 8 experts and dense students, {steps} steps, "
        "seeds: {seeds}",
        {
            "model": "model",
            "nats_per_byte": "cross-entropy on other text, nats a byte",
            "share_of_gain": "share of the mixture's gain",
        },
    ),
}


def gather(names: list[str]) -> list[Claim]:
    """Write results.json, its page and the plot; return the claims."""
    measures = read_measures(names, measure_path, RESULTS)
    write_results({"measures": measures}, RESULTS, PAGE, summarise)
    plot(measures, PLOT)
    return claims_of(measures)


def summarise(results: dict[str, Any]) -> str:
    """Return the page."""
    return page_of("distillation", PLOT.name, TABLES, results["measures"])
