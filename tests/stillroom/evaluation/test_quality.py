"""Quality against a slow loop over rows and positions."""

import math

import pytest
import torch

from stillroom.data.examples import Examples
from stillroom.errors import DataError, MismatchError, NotFiniteError
from stillroom.evaluation import quality as module
from stillroom.evaluation.quality import measure_qualities, measure_quality
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked, tiny_llama

# peft asks transformers for a property that is about to be renamed.
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def text(rows: int = 5, length: int = 12, seed: int = 0) -> Examples:
    """Return rows of two documents, with padding, a masked prompt and a row without labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, :3] = 0  # padded on the left
    labels = ids.masked_fill(mask == 0, -100)
    labels[3, :6] = -100
    labels[4] = -100
    documents = torch.tensor([7, 7, 2, 2, 9])[:rows]
    return Examples(ids, mask, labels, documents, "hash")


def sentences(seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (7, 10), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = torch.randint(3, (7,), generator=draw)
    return Examples(ids, mask, labels, torch.arange(7) // 2, "hash", ("a", "b", "c"))


def cloze() -> Examples:
    """Return `text` with every third word hidden, its first ones too."""
    plain = text()
    hidden = (torch.arange(12) % 3 == 0) & (plain.attention_mask == 1)
    ids, labels = plain.input_ids.masked_fill(hidden, 3), plain.input_ids.masked_fill(~hidden, -100)
    return Examples(ids, plain.attention_mask, labels, plain.documents, "hash", masked=True)


@torch.no_grad()
def slow(model, teacher, examples):
    """Return {document: [count, nats, kl, agreed, correct]}, one position at a time."""
    sums: dict[int, list[float]] = {}
    for row in range(len(examples)):
        ids, mask = examples.input_ids[row : row + 1], examples.attention_mask[row : row + 1]
        ours = model(input_ids=ids, attention_mask=mask).logits[0].double()
        theirs = teacher(input_ids=ids, attention_mask=mask).logits[0].double()
        if examples.label_names:
            pairs = [(ours, theirs, int(examples.labels[row]))]
        elif examples.masked:
            pairs = [
                (ours[t], theirs[t], int(examples.labels[row, t]))
                for t in range(ids.shape[1])
                if examples.labels[row, t] != -100
            ]
        else:
            pairs = [
                (ours[t - 1], theirs[t - 1], int(examples.labels[row, t]))
                for t in range(1, ids.shape[1])
                if examples.labels[row, t] != -100 and mask[0, t - 1] == 1
            ]
        for q, p, label in pairs:
            q_share, p_share = torch.softmax(q, 0), torch.softmax(p, 0)
            entry = sums.setdefault(int(examples.documents[row]), [0.0] * 5)
            entry[0] += 1
            entry[1] -= math.log(q_share[label])
            entry[2] += float((p_share * (p_share.log() - q_share.log())).sum())
            entry[3] += int(q.argmax() == p.argmax())
            entry[4] += int(q.argmax() == label)
    return sums


@pytest.mark.parametrize(
    ("make", "examples", "task"),
    [
        (tiny_llama, text(), "causal_lm"),
        (tiny_bert_classifier, sentences(), "sequence_classification"),
        (tiny_bert_masked, cloze(), "masked_lm"),
    ],
)
def test_sums_equal_the_slow_reference(make, examples, task):
    model, teacher = make(seed=1), make(seed=2)
    measured = measure_quality(model, teacher, examples, task=task, batch_rows=2)
    expected = slow(model, teacher, examples)
    assert measured.documents == tuple(sorted(expected))
    for i, document in enumerate(measured.documents):
        count, nats, kl, agreed, correct = expected[document]
        assert measured.counts[i] == count
        assert measured.nats[i] == pytest.approx(nats, rel=1e-4)
        assert measured.kl_nats[i] == pytest.approx(kl, rel=1e-4)
        assert (measured.agreed[i], measured.correct[i]) == (agreed, correct)
    assert measured.estimate("kl_nats").value > 0


def test_perplexity_is_that_of_all_tokens():
    model = tiny_llama()
    sums = slow(model, model, text()).values()
    expected = math.exp(sum(s[1] for s in sums) / sum(s[0] for s in sums))
    measured = measure_quality(model, None, text()).estimate("perplexity")
    assert measured.value == pytest.approx(expected, rel=1e-5)
    assert measured.standard_error > 0


def test_equal_models_have_no_divergence_though_both_run():
    measured = measure_quality(tiny_llama(seed=3), tiny_llama(seed=3), text())
    assert measured.kl_nats == (0.0, 0.0)
    assert measured.agreed == measured.counts


def test_its_own_teacher_runs_once():
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    alone = measure_quality(model, None, text(), batch_rows=5)
    itself = measure_quality(model, model, text(), batch_rows=5)
    assert len(calls) == 2
    assert alone == itself
    assert itself.estimate("kl_nats").value == 0
    assert itself.estimate("agreement").value == 1


def test_several_models_share_one_teacher_run():
    teacher, a, b = tiny_llama(seed=1), tiny_llama(seed=2), tiny_llama(seed=3)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    together = measure_qualities({"t": teacher, "a": a, "b": b}, teacher, text(), batch_rows=5)
    assert len(calls) == 1
    assert together["a"] == measure_quality(a, teacher, text(), batch_rows=5)
    assert together["b"] == measure_quality(b, teacher, text(), batch_rows=5)
    assert together["t"].kl_nats == (0.0, 0.0)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_change_nothing(monkeypatch, chunk):
    model, teacher = tiny_llama(seed=1), tiny_llama(seed=2)
    whole = measure_quality(model, teacher, text())
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = measure_quality(model, teacher, text())
    assert parts.counts == whole.counts
    assert parts.agreed == whole.agreed
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert parts.kl_nats == pytest.approx(whole.kl_nats, rel=1e-6)


def test_log_probabilities_are_never_taken_of_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 6)
    widths = []
    softmax = torch.Tensor.log_softmax

    def watched(self, dim):
        widths.append(self.shape)
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watched)
    measure_quality(tiny_llama(seed=1), tiny_llama(seed=2), text())
    assert widths
    assert max(rows for rows, _ in widths) == 6


def test_batches_change_nothing_and_progress_counts_rows():
    seen = []
    model = tiny_llama()
    one = measure_quality(model, None, text(), batch_rows=1)
    two = measure_quality(
        model, None, text(), batch_rows=2, progress=lambda *report: seen.append(report)
    )
    assert one.nats == pytest.approx(two.nats, rel=1e-5)
    assert [done for done, *_ in seen] == [2, 4, 5]
    assert {(total, unit) for _, total, unit, *_ in seen} == {(5, "rows")}


def test_modes_are_put_back():
    model = tiny_llama().train()
    model.lm_head.eval()
    measure_quality(model, None, text())
    assert model.training
    assert not model.lm_head.training


def test_nan_is_refused_with_its_document():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NotFiniteError, match="document 2"):
        measure_quality(model, None, text())


def test_tokens_masked_out_in_both_models_count_nothing():
    def mask(module, inputs, output):
        output.logits[..., 0] = -math.inf

    model, teacher = tiny_llama(seed=1), tiny_llama(seed=2)
    for each in (model, teacher):
        each.register_forward_hook(mask)
    measured = measure_quality(model, teacher, text())
    assert measured.estimate("kl_nats").value > 0


def test_nothing_to_predict_is_refused():
    examples = text().take(slice(4, 5))
    with pytest.raises(DataError, match="nothing to predict"):
        measure_quality(tiny_llama(), None, examples)


def test_another_vocabulary_is_refused():
    with pytest.raises(MismatchError, match="96 outputs and the model 64"):
        measure_quality(tiny_llama(), tiny_llama(vocab=96), text())


@peft_warns
def test_virtual_tokens_in_front_are_not_scored():
    from peft import PromptTuningConfig, get_peft_model

    model = tiny_llama()
    plain = measure_quality(model, None, text())
    prompted = get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    measured = measure_quality(prompted, None, text())
    assert measured.counts == plain.counts
    ids = text().input_ids[:1]
    with torch.no_grad():
        logits = prompted(input_ids=ids).logits[0, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    first = measure_quality(prompted, None, text().take(slice(0, 1)))
    assert first.nats[0] == pytest.approx(float(expected), rel=1e-5)
