from dataclasses import replace

import pytest
import torch

from stillroom.checkpoint import FolderCheckpoints
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import initialise_student
from stillroom.distillation.teacher_cache import CacheOptions, capture
from stillroom.errors import MismatchError, RecipeError
from stillroom.fine_tuning import fine_tune, measure
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import TOKENIZER, labelled_rows, masked_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_masked import MASKED

TRAINING = TrainingOptions(
    steps=30, batch_rows=4, learning_rate=5e-3, checkpoint_every_steps=4, evaluate_every_steps=15
)
OPTIONS = DistillationOptions(TRAINING, soft_weight=1.0, hard_weight=0.0, temperature=1.0)


class Stopped(Exception):
    pass


def cached(folder, teacher, examples, **options):
    chosen = CacheOptions(rows_per_shard=4, **options)
    return capture(teacher, examples, folder, chosen, tokenizer_hash=TOKENIZER)


def kl(teacher, student, examples):
    with torch.no_grad():
        p = torch.log_softmax(teacher(input_ids=examples.input_ids).logits, -1)
        q = torch.log_softmax(student(input_ids=examples.input_ids).logits, -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_early_stopping_goes_by_the_divergence_on_held_out_rows(tmp_path):
    teacher, examples, fresh = (
        tiny_llama(layers=3),
        token_rows(8),
        token_rows(10, seed=1, padding=3),
    )
    cache = cached(tmp_path / "train", teacher, examples)
    held_out = Taught(fresh, cached(tmp_path / "held out", teacher, fresh, kind="dense"))
    student = initialise_student(teacher, (0,))
    # Eight rows, learned by heart: sooner or later the student gets worse on others.
    training = replace(
        TRAINING, steps=200, learning_rate=2e-2, evaluate_every_steps=2, early_stopping_patience=3
    )
    options = replace(OPTIONS, training=training)
    history = distill(student, Taught(examples, cache), options, evaluation=held_out)
    nats = history.evaluations["held_out_kl_nats"]
    assert len(history.steps) < 200
    assert history.evaluation_steps[nats.index(min(nats))] == history.best_step
    still = replace(training, steps=1, learning_rate=1e-30, weight_decay=0.0)
    again = distill(
        student, Taught(examples, cache), replace(options, training=still), evaluation=held_out
    )
    assert again.evaluations["held_out_kl_nats"] == pytest.approx([min(nats)], rel=1e-5)
    with torch.no_grad():
        ids, mask = fresh.input_ids, fresh.attention_mask
        p = teacher(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        q = student(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    real = mask[:, 1:].bool()  # where a next token is known
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1][real].mean().item()
    assert min(nats) == pytest.approx(expected, rel=1e-3)


def test_held_out_targets_of_other_rows_are_refused(tmp_path):
    teacher, examples, fresh = tiny_llama(layers=3), token_rows(8), token_rows(8, seed=1)
    cache = cached(tmp_path, teacher, examples)
    student = initialise_student(teacher, (0,))
    with pytest.raises(MismatchError, match="other rows"):
        distill(student, Taught(examples, cache), OPTIONS, evaluation=Taught(fresh, cache))


@pytest.mark.parametrize("kind", ["sampled", "dense"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_comes_closer_to_the_teacher(tmp_path, kind, temperature):
    # Every row once, so that a student cannot learn the draws by heart.
    teacher, examples = tiny_llama(layers=3), token_rows(240)
    cache = cached(tmp_path, teacher, examples, kind=kind, temperature=temperature)
    student, fresh = initialise_student(teacher, (0,)), token_rows(10, seed=1)
    before = kl(teacher, student, fresh)
    training = replace(TRAINING, batch_rows=8, learning_rate=3e-3)
    options = replace(OPTIONS, temperature=temperature, training=training)
    history = distill(student, Taught(examples, cache), options, evaluation=Taught(fresh))
    assert kl(teacher, student, fresh) < 0.9 * before
    assert list(history.figures) == ["kl_nats"]
    assert history.evaluation_steps == [15, 30]
    assert set(history.evaluations) == {"held_out_cross_entropy_nats", "held_out_accuracy"}


def kl_of_hidden_words(teacher, student, examples):
    """Return the mean KL at the hidden words, one position after the other."""
    nats = []
    for row in range(len(examples)):
        ids = examples.input_ids[row : row + 1]
        mask = examples.attention_mask[row : row + 1]
        with torch.no_grad():
            p, q = (m(input_ids=ids, attention_mask=mask).logits[0] for m in (teacher, student))
        for position in (examples.labels[row] != -100).nonzero()[:, 0].tolist():
            share = p[position].softmax(-1)
            nats.append(float((share * (share.log() - q[position].log_softmax(-1))).sum()))
    return sum(nats) / len(nats)


@pytest.mark.parametrize("kind", ["sampled", "dense"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_student_comes_closer_to_the_teacher(tmp_path, kind, name):
    teacher, examples = MASKED[name](), masked_rows(240, padding=3)
    fresh = masked_rows(10, seed=1, padding=3)
    cache = cached(tmp_path / "train", teacher, examples, kind=kind)
    held_out = Taught(fresh, cached(tmp_path / "held out", teacher, fresh, kind="dense"))
    student = initialise_student(teacher, (0,))
    before = kl_of_hidden_words(teacher, student, fresh)
    training = replace(TRAINING, batch_rows=8, learning_rate=3e-3)
    options = replace(OPTIONS, training=training)
    history = distill(student, Taught(examples, cache), options, evaluation=held_out)
    after = kl_of_hidden_words(teacher, student, fresh)
    assert after < 0.9 * before
    assert history.evaluations["held_out_kl_nats"][-1] == pytest.approx(after, rel=1e-4)


def test_masked_loss_is_taken_at_the_hidden_words_alone(tmp_path):
    teacher, examples = MASKED["masked bert"](), masked_rows(6, padding=2)
    cache = cached(tmp_path, teacher, examples, kind="dense", temperature=2.0, hidden_states="last")
    student = initialise_student(teacher, (0,))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    still = replace(TRAINING, steps=1, batch_rows=6, learning_rate=1e-30, weight_decay=0.0)
    options = DistillationOptions(
        still, soft_weight=5.0, hard_weight=2.0, temperature=2.0, cosine_weight=1.0
    )
    history = distill(student, Taught(examples, cache), options)
    arguments = {"input_ids": examples.input_ids, "attention_mask": examples.attention_mask}
    with torch.no_grad():
        ours, theirs = (m(**arguments, output_hidden_states=True) for m in (student, teacher))
    hidden, real = examples.labels != -100, examples.attention_mask == 1
    q, p = (each.logits[hidden] for each in (ours, theirs))
    share = (p / 2).softmax(-1)
    kl = (share * (share.log() - (q / 2).log_softmax(-1))).sum(-1).mean()
    hard = -q.log_softmax(-1)[torch.arange(len(q)), examples.labels[hidden]].mean()
    last = [each.hidden_states[-1][real] for each in (ours, theirs)]
    cosine = 1 - torch.nn.functional.cosine_similarity(*last).mean()
    expected = 5 * 4 * kl + 2 * hard + cosine
    assert history.loss[0] == pytest.approx(expected.item(), rel=1e-3)
    assert history.figures["cross_entropy_nats"][0] == pytest.approx(hard.item(), rel=1e-4)


@pytest.mark.parametrize("divergence", ["cross_entropy", "reverse_kl", "jensen_shannon"])
def test_student_comes_closer_by_every_divergence(tmp_path, divergence):
    teacher, examples = tiny_llama(layers=3), token_rows(240)
    cache = cached(tmp_path, teacher, examples, kind="dense")
    student, fresh = initialise_student(teacher, (0,)), token_rows(10, seed=1)
    before = kl(teacher, student, fresh)
    training = replace(TRAINING, batch_rows=8, learning_rate=3e-3)
    distill(
        student, Taught(examples, cache), replace(OPTIONS, divergence=divergence, training=training)
    )
    assert kl(teacher, student, fresh) < 0.9 * before


def test_hidden_states_come_closer_in_direction(tmp_path):
    teacher, examples = tiny_llama(layers=3), token_rows(240)
    cache = cached(tmp_path, teacher, examples, hidden_states="last")
    student = initialise_student(teacher, (0,))
    training = replace(TRAINING, batch_rows=8, learning_rate=3e-3)
    options = replace(OPTIONS, soft_weight=0.0, cosine_weight=2.0, training=training)
    history = distill(student, Taught(examples, cache), options)
    distances = history.figures["hidden_cosine_distance"]
    assert history.loss == pytest.approx([2 * each for each in distances])
    assert distances[-1] < 0.7 * distances[0]
    with torch.no_grad():
        arguments = {"input_ids": examples.input_ids, "output_hidden_states": True}
        theirs, ours = (m(**arguments).hidden_states[-1] for m in (teacher, student))
    expected = 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean().item()
    still = replace(training, steps=1, batch_rows=240, learning_rate=1e-30, weight_decay=0.0)
    history = distill(student, Taught(examples, cache), replace(options, training=still))
    # The cache holds halves.
    assert history.figures["hidden_cosine_distance"] == [pytest.approx(expected, abs=1e-4)]


def test_small_batches_of_unequal_labels_have_the_cosine_of_one_large_batch(tmp_path):
    rows = token_rows(4, padding=3)
    labels = rows.labels.clone()
    labels[:2, :8] = -100  # a long prompt: fewer labels than tokens
    rows = replace(rows, labels=labels)
    cache = cached(tmp_path, tiny_llama(seed=1), rows, hidden_states="last")

    def once(batch_rows, count):
        training = replace(TRAINING, steps=1, batch_rows=batch_rows, gradient_accumulation=count)
        options = replace(OPTIONS, soft_weight=0.5, cosine_weight=1.0, training=training)
        history = distill(tiny_llama(seed=2), Taught(rows, cache), options)
        figures = [history.loss[0], history.gradient_norm[0]]
        return figures + [each[0] for each in history.figures.values()]

    for batch_rows, count in ((1, 4), (2, 2)):
        assert once(batch_rows, count) == pytest.approx(once(4, 1), rel=1e-5)


def test_the_cosine_needs_hidden_states(tmp_path):
    teacher, examples = tiny_llama(layers=3), token_rows(8)
    cache = cached(tmp_path, teacher, examples)
    with pytest.raises(MismatchError, match="holds no hidden states"):
        distill(
            initialise_student(teacher, (0,)),
            Taught(examples, cache),
            replace(OPTIONS, cosine_weight=1.0),
        )


def test_gradient_from_drawn_targets_is_unbiased(tmp_path):
    teacher, examples = tiny_llama(layers=3), token_rows(2, 8)
    student = initialise_student(teacher, (0,))

    def gradient(folder, **options):
        cache = cached(folder, teacher, examples, **options)
        gradients = []

        def keep(module, inputs, output):
            output.logits.register_hook(gradients.append)

        hook = student.register_forward_hook(keep)
        still = replace(TRAINING, steps=1, batch_rows=2, learning_rate=1e-30, weight_decay=0.0)
        distill(student, Taught(examples, cache), replace(OPTIONS, training=still))
        hook.remove()
        return gradients[0].double()

    dense = gradient(tmp_path, kind="dense")
    draws = torch.stack([gradient(tmp_path, seed=seed) for seed in range(100)])
    # Along random directions, where sums of many rare draws are close to normal.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(dense.numel(), 30, generator=generator, dtype=torch.float64)
    along = draws.flatten(1) @ directions  # (draws, directions)
    error = along.std(0) / 10
    assert ((along.mean(0) - dense.flatten() @ directions).abs() <= 5 * error).all()
    one = (draws[0] - dense).norm()
    assert (draws.mean(0) - dense).norm() < 0.2 * one
    assert (gradient(tmp_path, kind="top_k", head=12) - dense).norm() > 0.5 * one


def test_both_losses_are_named(tmp_path):
    teacher, examples = tiny_llama(), token_rows(4)
    cache = cached(tmp_path, teacher, examples)
    options = replace(OPTIONS, hard_weight=0.5, training=replace(TRAINING, steps=2))
    history = distill(initialise_student(teacher, (0,)), Taught(examples, cache), options)
    for loss, soft, hard in zip(
        history.loss,
        history.figures["kl_nats"],
        history.figures["cross_entropy_nats"],
        strict=True,
    ):
        assert loss == pytest.approx(soft + 0.5 * hard, rel=1e-5)


def test_without_a_cache_it_is_plain_cross_entropy():
    teacher, examples = tiny_llama(), token_rows(4)
    one, other = (initialise_student(teacher, (1,)) for _ in range(2))
    options = replace(OPTIONS, training=replace(TRAINING, steps=3))
    history = distill(one, Taught(examples), options)
    assert history.loss == fine_tune(other, examples, options.training).loss
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_classifier_learns_from_cached_logits(tmp_path):
    teacher, examples = tiny_bert_classifier(layers=3), labelled_rows(12)
    fine_tune(teacher, examples, replace(TRAINING, steps=40))
    assert measure(teacher, examples, 5)["held_out_accuracy"] == 1
    cache = cached(tmp_path, teacher, examples)
    student = tiny_bert_classifier(seed=7)
    before = kl(teacher, student, examples)
    distill(student, Taught(examples, cache), replace(OPTIONS, hard_weight=0.5))
    assert kl(teacher, student, examples) < 0.2 * before


def test_distillation_resumes_to_the_same_bytes(tmp_path):
    teacher, examples = tiny_llama(), token_rows(6)
    cache = cached(tmp_path / "cache", teacher, examples)
    options = replace(OPTIONS, training=replace(TRAINING, steps=10))
    whole = initialise_student(teacher, (0,))
    distill(whole, Taught(examples, cache), options)

    def stop(done, total, unit, note=""):
        if done == 6:
            raise Stopped

    checkpoints = FolderCheckpoints(tmp_path / "pieces")
    with pytest.raises(Stopped):
        distill(
            initialise_student(teacher, (0,)),
            Taught(examples, cache),
            options,
            checkpoints=checkpoints,
            progress=stop,
        )
    resumed = initialise_student(teacher, (0,))
    with pytest.raises(MismatchError, match="fingerprint"):
        distill(
            resumed,
            Taught(examples, cache),
            replace(options, hard_weight=1.0),
            checkpoints=checkpoints,
        )
    distill(resumed, Taught(examples, cache), options, checkpoints=checkpoints)
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_does_not_belong_together_is_refused(tmp_path):
    teacher, examples = tiny_llama(), token_rows(4)
    cache = cached(tmp_path, teacher, examples)
    student = initialise_student(teacher, (0,))
    with pytest.raises(MismatchError, match="temperature"):
        distill(student, Taught(examples, cache), replace(OPTIONS, temperature=3.0))
    with pytest.raises(MismatchError, match="64 words or labels, the student 70"):
        distill(tiny_llama(vocab=70), Taught(examples, cache), OPTIONS)
    with pytest.raises(RecipeError, match="cosine_weight are 0"):
        distill(student, Taught(examples, cache), replace(OPTIONS, soft_weight=0.0))


def test_measure_weighs_labels_and_not_batches():
    examples = token_rows(5, padding=6)
    one, other = (measure(tiny_llama(), examples, size) for size in (1, 3))
    assert one == pytest.approx(other, rel=1e-5)
    with torch.no_grad():
        logits = tiny_llama()(
            input_ids=examples.input_ids, attention_mask=examples.attention_mask
        ).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), examples.labels[:, 1:].flatten()
    )
    assert one["held_out_cross_entropy_nats"] == pytest.approx(expected.item(), rel=1e-5)
