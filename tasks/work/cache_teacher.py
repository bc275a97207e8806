"""Run the teacher once over the training rows, and keep what it said."""

from stillroom.distillation.inspection import CacheReport, inspect_cache
from stillroom.distillation.teacher_cache import gather
from tasks.cache_pool import share_capture
from tasks.cache_worker import plan_capture
from tasks.work.bench import Bench, Result


def work(bench: Bench) -> Result:
    """Write the teacher's targets, shard by shard, with as many workers as the recipe says.

    Those that work elsewhere have done so before this begins. What a lost worker leaves undone is
    made here, on the threads that a worker has: their number may change the last bits.
    """
    import torch

    plan = plan_capture(bench.order, bench.inputs)
    workers, metrics = bench.order.unkeyed.get("workers", 1), {}
    if workers > 1 and bench.order.unkeyed.get("over", "processes") == "processes":
        threads = max(1, torch.get_num_threads() // workers)
        metrics["lost_workers"] = float(share_capture(bench, plan, workers, threads))
        torch.set_num_threads(threads)
    gather(
        plan,
        bench.output,
        bench.checkpoints,
        bench.load_teacher,
        progress=bench.progress,
    )
    tokens = plan.examples.tokens
    metrics |= {"tokens": float(tokens)} | _metrics(inspect_cache(bench.output), tokens)
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
