from dataclasses import replace

import pytest
import torch

from stillroom.cli import main
from stillroom.distillation.inspection import inspect_cache
from stillroom.distillation.teacher_cache import CacheOptions, capture
from tests.stillroom.rows import TOKENIZER, labelled_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama

TEACHER = tiny_llama()
OPTIONS = CacheOptions(
    head=4, draws=8, rows_per_shard=8, batch_rows=8, temperature=1.5, audit_rows=32
)
EXAMPLES = token_rows(40, 24, padding=5)


def report(folder, options=OPTIONS, examples=EXAMPLES):
    capture(TEACHER, examples, folder, options, tokenizer_hash=TOKENIZER)
    return inspect_cache(folder)


def distributions(examples=EXAMPLES):
    """Return the teacher's distributions (positions, vocab) where there is no padding."""
    with torch.no_grad():
        logits = TEACHER(
            input_ids=examples.input_ids, attention_mask=examples.attention_mask
        ).logits
    return torch.softmax(logits / 1.5, -1)[examples.attention_mask == 1].double()


def test_figures_are_those_of_the_teacher(tmp_path):
    found = report(tmp_path)
    p = distributions()
    head = p.topk(4).values.sum(-1)
    assert found.positions == len(p) == EXAMPLES.tokens
    assert found.head_mass == pytest.approx(head.mean().item(), rel=1e-3)
    assert found.tail_mass == pytest.approx(1 - head.mean().item(), rel=1e-3)
    low = head.sort().values[round(0.05 * len(head)) - 1].item()
    assert found.head_mass_low == pytest.approx(low, rel=1e-3, abs=1e-4)
    entropy = torch.special.entr(p).sum(-1).mean().item()
    assert found.entropy_nats == pytest.approx(entropy, rel=1e-4)  # rounded to float16
    assert found.audit_bytes > 32 * 24 * 64 * 4


def test_words_are_counted_once_a_position(tmp_path):
    found = report(tmp_path, replace(OPTIONS, head=1, draws=3, audit_rows=0))
    # One of the head, and the stratified draws; by a slow count over the reader.
    from stillroom.distillation.cache_files import TeacherCache

    targets = TeacherCache.open(tmp_path).targets(torch.arange(40))
    real = EXAMPLES.attention_mask == 1
    counts = [
        len({word for word, mass in zip(words, masses, strict=True) if mass > 0})
        for words, masses in zip(
            targets.ids[real].tolist(), targets.probabilities[real].tolist(), strict=True
        )
    ]
    assert found.words_per_position == pytest.approx(sum(counts) / len(counts))
    assert found.audit is None


def test_sampled_targets_show_no_bias_and_top_k_shows_its_own(tmp_path):
    found = report(tmp_path / "sampled")
    audit, top = found.audit, found.audit_top_k
    assert audit.positions == int(EXAMPLES.attention_mask[:32].sum())
    assert audit.likely_bias_standard_error < 0.01
    assert abs(audit.likely_bias) < 4 * audit.likely_bias_standard_error
    assert all(abs(gap) <= 4.5 * error + 1e-12 for gap, error in audit.bins)
    assert audit.calibration_error < 3 * audit.calibration_noise
    # What top-k gives its words beyond the teacher is all the mass that it leaves out.
    p = distributions(EXAMPLES.take(slice(0, 32)))
    left = 1 - p.topk(12).values.sum(-1).mean().item()
    assert top.likely_bias == pytest.approx(left, rel=1e-4)
    assert left > 50 * audit.likely_bias_standard_error
    assert top.calibration_error > 5 * audit.calibration_error
    # Of a cache that holds top-k itself, both are the same but for float16.
    own = report(tmp_path / "top", replace(OPTIONS, kind="top_k", head=12))
    assert own.audit.likely_bias == pytest.approx(left, rel=1e-3)
    assert own.audit.calibration_error == pytest.approx(top.calibration_error, rel=1e-2)
    assert own.tail_mass == 0
    assert own.entropy_nats == pytest.approx(found.entropy_nats, rel=1e-4)  # the teacher's


def test_dense_and_classification_caches_are_measured(tmp_path):
    found = report(tmp_path / "dense", replace(OPTIONS, kind="dense"))
    assert found.positions == EXAMPLES.tokens
    assert (found.head_mass, found.tail_mass, found.words_per_position) == (1, 0, 64)
    entropy = torch.special.entr(distributions()).sum(-1).mean().item()
    assert found.entropy_nats == pytest.approx(entropy, rel=1e-5)
    teacher, rows = tiny_bert_classifier(), labelled_rows(5)
    capture(teacher, rows, tmp_path / "classes", OPTIONS, tokenizer_hash=TOKENIZER)
    found = inspect_cache(tmp_path / "classes")
    assert (found.positions, found.words_per_position, found.audit) == (5, 3, None)


def test_command_prints_a_table_and_refuses_what_is_no_cache(tmp_path, capsys):
    found = report(tmp_path / "cache")
    assert main(["inspect", str(tmp_path / "cache")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sampled teacher cache: head 4, draws 8, temperature 1.5, seed 0\n")
    assert f"{found.bytes_per_token:.1f}  in the shards" in out
    assert f"{found.audit.likely_bias:+.6f}  ± " in out
    assert "top-12: bias" in out
    report(tmp_path / "plain", replace(OPTIONS, audit_rows=0))
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    assert "no audit rows" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no teacher cache" in capsys.readouterr().err
