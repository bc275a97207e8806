"""Run the teacher once over the training rows, and keep what it said."""

from stillroom.data.prepare import load_prepared
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
    size = sum(file.stat().st_size for file in bench.output.iterdir())
    metrics = {"tokens": float(train.tokens), "bytes_per_token": size / train.tokens}
    return Result(licence=bench.licence("teacher"), metrics=metrics)
