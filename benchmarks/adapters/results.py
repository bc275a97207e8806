"""Gather the measurements into results.json, the page and the plot."""

from typing import Any

from benchmarks.adapters.places import HERE, measure_path
from benchmarks.adapters.plot import plot
from benchmarks.claims import Claim
from benchmarks.results import Tables, claims_of, page_of, read_measures, write_results

RESULTS = HERE / "results.json"
PAGE = HERE / "RESULTS.md"
PLOT = HERE / "adapters.png"

TABLES: Tables = {
    "sst2": (
        "## MiniLM on SST-2, seeds: {seeds}\n\n{train_examples} phrases to learn from, "
        "passes: {passes}, {examples} of other sentences to measure on. Trained parameters are "
        "without the new head, which every method has; their share is of all of MiniLM. ± is over "
        "sentences and seeds.",
        {
            "base": "base",
            "method": "method",
            "trained": "trained parameters",
            "trained_share": "%",
            "accuracy": "right, %",
            "lost": "lost against full fine-tuning on fp32, points",
            "standard_error": "± ",
            "lost_itself": "lost against itself on fp32",
            "itself_error": "± ",
            "glue": "right of GLUE's 872, %",
            "learning_rate": "learning rate",
        },
    ),
    "by_peft": (
        "## By peft\n\nThe same methods as peft has them, on fp32, at the same learning rate; "
        "seeds: {seeds}.",
        {
            "method": "method",
            "trained": "trained parameters",
            "peft_trained": "peft's",
            "accuracy": "right, %",
            "peft_accuracy": "by peft, %",
            "lost": "lost against peft, points",
            "standard_error": "± ",
        },
    ),
    "few_examples": (
        "## The same with {train_examples} phrases, ten times, others for each of {seeds} seeds",
        {
            "method": "method",
            "accuracy": "right, %",
            "lost": "lost against full fine-tuning, points",
            "standard_error": "± ",
        },
    ),
    "costs": (
        "## A step of MiniLM, 32 rows of 64 tokens, {threads} threads, medians of {rounds}",
        {
            "base": "base",
            "method": "method",
            "seconds": "seconds",
            "over_full": "over full fine-tuning's on fp32",
            "memory_mb": "memory beside the model's, MB",
        },
    ),
    "text": (
        "## SmolLM2 on CPython's source, {train_rows} rows of {length} tokens, once\n\n"
        "Measured on {test_rows} rows of other files; ± is over rows, of one seed.",
        {
            "method": "method",
            "trained": "trained parameters",
            "nats": "loss, nats a token",
            "perplexity": "perplexity",
            "gained": "gained, nats",
            "standard_error": "± ",
            "seconds": "seconds a step",
        },
    ),
    "dimension": (
        "## In how few dimensions SST-2 is learned\n\nd{percent}: where {percent} % of full "
        "fine-tuning's accuracy is reached, over {seeds} seeds; {train_examples} phrases, twice, "
        "measured on {examples} of other sentences.",
        {
            "model": "model",
            "parameters": "parameters",
            "full": "all of them trained, right, %",
            "dimension": "dimensions",
            "low": "95 % from",
            "high": "to",
            "lora_rank": "LoRA's rank with as many",
            "trials": "trials",
        },
    ),
    "subspace_step": (
        "## A step in a subspace of {dimension} dimensions, 32 rows of 64 tokens, {threads} "
        "threads, medians",
        {
            "transform_seconds": "the transform of 2^24 floats, seconds",
            "full_step_seconds": "a step of full fine-tuning",
            "subspace_step_seconds": "a step in the subspace",
            "subspace_over_full": "over full",
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
    return page_of("adapters", PLOT.name, TABLES, results["measures"])
