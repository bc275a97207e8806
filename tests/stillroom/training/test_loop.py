import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stillroom.checkpoint import FolderCheckpoints
from stillroom.errors import DataError, MismatchError, NotFiniteError, RecipeError, StageError
from stillroom.fine_tuning import cross_entropy
from stillroom.training.history import TrainingHistory
from stillroom.training.loop import HeldOut, train
from stillroom.training.options import TrainingOptions
from tests.stillroom.rows import labelled_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama

OPTIONS = TrainingOptions(
    steps=6, batch_rows=2, learning_rate=1e-2, checkpoint_every_steps=2, seed=5
)


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(done, total, unit, note=""):
        if done == step:
            raise Stopped

    return progress


def same_bytes(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("killed_at", [2, 3, 5])
def test_resumed_run_ends_with_the_same_bytes(tmp_path, killed_at):
    # BERT drops out a tenth of its activations, so the random numbers count too.
    examples = labelled_rows(7)
    whole, killed = tiny_bert_classifier(), tiny_bert_classifier()
    before = copy.deepcopy(whole)
    expected = train(whole, examples, cross_entropy, OPTIONS, fingerprint="x")
    checkpoints = FolderCheckpoints(tmp_path)
    with pytest.raises(Stopped):
        train(
            killed,
            examples,
            cross_entropy,
            OPTIONS,
            checkpoints=checkpoints,
            fingerprint="x",
            progress=stop_at(killed_at),
        )
    assert checkpoints.names() == [f"step-{killed_at // 2 * 2:08d}"]
    torch.rand(3)  # the process that resumes has other random numbers behind it
    resumed = tiny_bert_classifier()
    seen = []
    history = train(
        resumed,
        examples,
        cross_entropy,
        OPTIONS,
        checkpoints=checkpoints,
        fingerprint="x",
        progress=lambda done, total, unit, note="": seen.append(done),
    )
    assert seen == list(range(killed_at // 2 * 2 + 1, 7))
    assert same_bytes(resumed, whole)
    assert not same_bytes(whole, before)
    assert history.steps == expected.steps == [1, 2, 3, 4, 5, 6]
    assert history.loss == expected.loss
    assert history.gradient_norm == expected.gradient_norm
    assert history.figures == expected.figures


def test_float16_parameters_are_not_trained():
    with pytest.raises(
        RecipeError, match=r"of \d+ are float16 \(model\.embed_tokens\.weight first"
    ):
        train(tiny_llama().half(), token_rows(4), cross_entropy, OPTIONS)
    train(tiny_llama().bfloat16(), token_rows(4), cross_entropy, replace(OPTIONS, steps=1))


def test_checkpoint_of_another_run_is_refused_saying_what_differs(tmp_path):
    checkpoints = FolderCheckpoints(tmp_path)
    examples = token_rows()
    with pytest.raises(Stopped):
        train(
            tiny_llama(),
            examples,
            cross_entropy,
            OPTIONS,
            checkpoints=checkpoints,
            fingerprint="teacher a",
            progress=stop_at(2),
        )

    def again(options=OPTIONS, fingerprint="teacher a", examples=examples, layers=2):
        train(
            tiny_llama(layers=layers),
            examples,
            cross_entropy,
            options,
            checkpoints=checkpoints,
            fingerprint=fingerprint,
        )

    with pytest.raises(MismatchError, match="fingerprint was 'teacher a' and is 'teacher b'"):
        again(fingerprint="teacher b")
    with pytest.raises(MismatchError, match=r"learning_rate was 0\.01 and is 0\.1"):
        again(options=replace(OPTIONS, learning_rate=0.1))
    with pytest.raises(MismatchError, match="rows was 6 and is 5"):
        again(examples=token_rows(5))
    with pytest.raises(MismatchError, match="other trainable parameters"):
        again(layers=1)
    again(options=replace(OPTIONS, checkpoint_every_steps=1))


def test_accumulated_batches_equal_one_large_batch():
    # Uneven padding: a plain mean of the batches' means would differ.
    examples = token_rows(8, padding=7)
    small, large = tiny_llama(), tiny_llama()
    options = replace(OPTIONS, steps=1, batch_rows=2, gradient_accumulation=2)
    one = train(small, examples, cross_entropy, options)
    two = train(
        large, examples, cross_entropy, replace(options, batch_rows=4, gradient_accumulation=1)
    )
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert one.gradient_norm == pytest.approx(two.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_not_a_number_stops_and_keeps_the_last_good_state(tmp_path, bad):
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        value, figures = cross_entropy(model, batch)
        if calls == 4 and bad == "loss":
            value = value * math.nan
        if calls == 4 and bad == "gradient":
            # The square root's slope at 0 is infinite, its value is not.
            value = value + (value - value.detach()).clamp(min=0).sqrt()
        return value, figures

    checkpoints = FolderCheckpoints(tmp_path)
    model = tiny_llama()
    with pytest.raises(NotFiniteError, match="step 4"):
        train(model, token_rows(), loss, OPTIONS, checkpoints=checkpoints)
    assert checkpoints.names() == ["step-00000002"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_only_parameters_that_want_a_gradient_change():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    train(model, token_rows(), cross_entropy, OPTIONS)
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert changed == ["model.norm.weight"]


def test_training_lowers_the_loss_and_leaves_the_mode_alone():
    model = tiny_llama()
    history = train(model, token_rows(2), cross_entropy, replace(OPTIONS, steps=20))
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert not model.training


def test_evaluation_runs_without_dropout_at_its_steps_and_the_last():
    seen = []

    def evaluate(model):
        seen.append(model.training)
        return {"one": 1.0}

    options = replace(OPTIONS, steps=5, evaluate_every_steps=2)
    history = train(tiny_llama(), token_rows(), cross_entropy, options, held_out=HeldOut(evaluate))
    assert history.evaluation_steps == [2, 4, 5]
    assert history.evaluations == {"one": [1.0] * 3}
    assert seen == [False] * 3


def measuring(*figures):
    """Return a measurement that gives these figures one by one, and the list of its calls."""
    left = list(figures)
    return HeldOut(lambda model: {"loss": left.pop(0)}, watch="loss")


def test_early_stopping_ends_after_its_patience_and_keeps_the_best(tmp_path):
    options = replace(OPTIONS, steps=10, evaluate_every_steps=1, early_stopping_patience=2)
    checkpoints = FolderCheckpoints(tmp_path)
    model, expected = tiny_llama(), tiny_llama()
    held_out = measuring(3.0, 2.0, 2.5, 2.0)
    examples = token_rows()
    history = train(
        model, examples, cross_entropy, options, held_out=held_out, checkpoints=checkpoints
    )
    assert history.steps == history.evaluation_steps == [1, 2, 3, 4]
    assert history.best_step == 2
    assert history.kept() == {"loss": 2.0}
    stop = stop_at(2)
    with pytest.raises(Stopped):
        train(
            expected,
            examples,
            cross_entropy,
            replace(options, early_stopping_patience=0),
            progress=stop,
        )
    assert same_bytes(model, expected)


@pytest.mark.parametrize("figures", [(math.nan, 2.0, 3.0, 3.0), (2.0, math.nan, 3.0)])
def test_what_is_no_number_is_never_better(figures):
    options = replace(OPTIONS, steps=10, evaluate_every_steps=1, early_stopping_patience=2)
    held_out = measuring(*figures)
    history = train(tiny_llama(), token_rows(), cross_entropy, options, held_out=held_out)
    assert history.kept() == {"loss": 2.0}
    assert len(history.steps) == len(figures)


@pytest.mark.parametrize("killed_at", [3, 5])
def test_early_stopping_resumes_with_the_best_so_far(tmp_path, killed_at):
    # The best of all comes before the first checkpoint, or after the last that was written.
    figures = [3.0, 1.0, 2.0, 2.0, 0.5, 2.0] if killed_at == 5 else [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    options = replace(OPTIONS, steps=6, evaluate_every_steps=1, early_stopping_patience=5)
    options = replace(options, checkpoint_every_steps=killed_at - 1)
    examples, checkpoints = token_rows(), FolderCheckpoints(tmp_path)
    whole, killed, resumed = tiny_llama(), tiny_llama(), tiny_llama()
    expected = train(whole, examples, cross_entropy, options, held_out=measuring(*figures))
    with pytest.raises(Stopped):
        train(
            killed,
            examples,
            cross_entropy,
            options,
            held_out=measuring(*figures),
            checkpoints=checkpoints,
            progress=stop_at(killed_at),
        )
    rest = figures[killed_at - 1 :]
    history = train(
        resumed,
        examples,
        cross_entropy,
        options,
        held_out=measuring(*rest),
        checkpoints=checkpoints,
    )
    assert history.best_step == expected.best_step == (5 if killed_at == 5 else 2)
    assert history.evaluations == expected.evaluations
    assert same_bytes(resumed, whole)


def test_early_stopping_needs_something_to_go_by():
    options = replace(OPTIONS, early_stopping_patience=1)
    with pytest.raises(RecipeError, match="needs rows that are held out"):
        train(tiny_llama(), token_rows(), cross_entropy, options)


def test_padding_of_a_whole_batch_is_not_computed():
    seen = []

    def loss(model, batch):
        seen.append((batch.length, batch.labels.shape[1]))
        return cross_entropy(model, batch)

    examples = token_rows(4, padding=5)
    odd = examples.take(slice(1, None, 2))
    options = replace(OPTIONS, steps=1)
    short = train(tiny_llama(), odd, loss, options)
    assert seen == [(8, 8)]  # a multiple of eight
    cut = train(tiny_llama(), odd.without_shared_padding(), loss, options)
    assert short.loss == cut.loss


def test_recomputed_activations_give_the_same_bytes_in_less_memory():
    kept, recomputed = tiny_bert_classifier(), tiny_bert_classifier()
    examples = labelled_rows()
    options = replace(OPTIONS, steps=3)
    saved = []

    def bytes_kept(options, model):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train(model, examples, cross_entropy, options)
        saved.append(total)

    bytes_kept(options, kept)
    bytes_kept(replace(options, gradient_checkpointing=True), recomputed)
    assert same_bytes(kept, recomputed)
    assert saved[1] < 0.5 * saved[0]
    assert not recomputed.is_activation_checkpointing
    with pytest.raises(RecipeError, match="Linear cannot make its activations again"):
        train(
            nn.Linear(2, 2),
            examples,
            cross_entropy,
            replace(options, gradient_checkpointing=True),
        )


def test_autocast_leaves_the_parameters_in_float32():
    model = tiny_llama()
    dtypes = []

    def loss(model, batch):
        value, figures = cross_entropy(model, batch)
        hidden = model(input_ids=batch.input_ids).logits
        dtypes.append(hidden.dtype)
        return value, figures

    train(model, token_rows(), loss, replace(OPTIONS, steps=1, dtype="bfloat16"))
    assert dtypes == [torch.bfloat16]
    assert model.dtype == torch.float32


def test_history_survives_json():
    history = train(tiny_llama(), token_rows(), cross_entropy, replace(OPTIONS, steps=2))
    assert TrainingHistory.from_json(history.to_json()) == history
    assert len(history.tokens_per_second) == 2


def test_nothing_to_train_is_refused():
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(StageError, match="no parameter"):
        train(frozen, token_rows(), cross_entropy, OPTIONS)
    with pytest.raises(DataError, match="at least one row"):
        train(tiny_llama(), token_rows().take(slice(0, 0)), cross_entropy, OPTIONS)


def test_random_numbers_outside_are_untouched():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train(tiny_bert_classifier(), labelled_rows(), cross_entropy, replace(OPTIONS, steps=1))
    assert torch.equal(torch.rand(1), expected)


def test_order_of_rows_reaches_the_loss_function():
    seen = []

    def loss(model, batch):
        assert torch.equal(batch.input_ids, token_rows(5).input_ids[batch.rows])
        seen.extend(batch.rows.tolist())
        return cross_entropy(model, batch)

    options = replace(OPTIONS, steps=None, epochs=2, batch_rows=5)
    train(tiny_llama(), token_rows(5), loss, options)
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]


def test_biases_are_not_decayed():
    class OnlyBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))
            self.weight = nn.Parameter(torch.ones(3, 3))

    model = OnlyBias()
    options = replace(OPTIONS, steps=1, weight_decay=0.5, warmup_fraction=0)
    train(
        model,
        token_rows(),
        lambda model, batch: (0 * (model.bias.sum() + model.weight.sum()), {}),
        options,
    )
    assert torch.equal(model.bias, torch.ones(3))
    assert (model.weight < 1).all()
