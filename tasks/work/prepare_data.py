"""Turn texts into rows of tokens: to learn from, to measure on, to calibrate with."""

from stillroom.data.prepare import PrepareOptions, prepare, save_prepared
from stillroom.labels import label_order
from stillroom.models import load_tokenizer, tokenizer_hash
from tasks.work.bench import Bench, Result
from tasks.work.texts import read_texts

OPTIONS = PrepareOptions.__dataclass_fields__.keys() - {"seed"}


def work(bench: Bench) -> Result:
    """Write training, evaluation and calibration rows."""
    section = bench.section
    train = read_texts(bench, "train")
    evaluation = read_texts(bench, "evaluation") if "evaluation" in bench.order.sources else None
    teacher = bench.inputs["teacher"]
    tokenizer = load_tokenizer(teacher)
    options = PrepareOptions(
        seed=bench.order.seed, **{name: section[name] for name in OPTIONS & section.keys()}
    )
    data = prepare(
        options,
        train,
        evaluation,
        tokenizer,
        tokenizer_hash(tokenizer),
        bench.progress,
        label_order=label_order(teacher) if bench.task == "sequence_classification" else (),
    )
    save_prepared(data, bench.output)
    return Result(licence="as its texts", metrics=data.statistics)
