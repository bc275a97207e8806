"""Run the teacher once over the training rows, and keep what it said."""

from stillroom.data.prepare import load_prepared
from stillroom.distillation.inspection import CacheReport, inspect_cache
from stillroom.distillation.teacher_cache import CacheOptions, capture
from stillroom.models import load_tokenizer, tokenizer_hash
from tasks.work.bench import Bench, Result


def work(bench: Bench) -> Result:
    """Write the teacher's targets, shard by shard."""
    section, folder = bench.section, bench.inputs["teacher"]
    options = CacheOptions(
        kind=section["kind"],
        head=section["head"],
        draws=section["draws"],
        temperature=section["temperature"],
        rows_per_shard=section["rows_per_shard"],
        batch_rows=section["batch_rows"],
        seed=bench.order.seed,
        audit_rows=section["audit_rows"],
        hidden_states=section["hidden_states"],
    )
    train = load_prepared(bench.inputs["data"]).train
    capture(
        bench.load(folder),
        train,
        bench.output,
        options,
        tokenizer_hash=tokenizer_hash(load_tokenizer(folder)),
        fingerprint=bench.order.inputs["teacher"],
        checkpoints=bench.checkpoints,
        progress=bench.progress,
    )
    metrics = {"tokens": float(train.tokens)} | _metrics(inspect_cache(bench.output), train.tokens)
    return Result(licence=bench.licence("teacher"), metrics=metrics)


def _metrics(report: CacheReport, tokens: int) -> dict[str, float]:
    """Return the main figures; masses and biases are shares of 1."""
    positions = report.rows * report.facts.sequence_length
    metrics = {
        "bytes_per_token": report.bytes_per_token * positions / tokens,
        "audit_bytes": float(report.audit_bytes),
        "head_mass_share": report.head_mass,
        "head_mass_share_5_percent": report.head_mass_low,
        "tail_mass_share": report.tail_mass,
        "entropy_nats": report.entropy_nats,
        "words_per_position": report.words_per_position,
    }
    if report.audit is not None:
        metrics |= {
            "audit_bias_share": report.audit.likely_bias,
            "audit_bias_share_standard_error": report.audit.likely_bias_standard_error,
            "audit_calibration_error_share": report.audit.calibration_error,
        }
    return metrics
