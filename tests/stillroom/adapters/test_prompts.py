import pytest
import torch
from torch.nn.functional import cross_entropy

from stillroom.adapters.options import PromptOptions, PTuningOptions
from stillroom.adapters.prompts import PromptAdapter
from stillroom.errors import SourceError
from stillroom.training.modes import recomputing
from tests.stillroom.adapters.prompted import (
    BASES,
    BOTH_HALVES,
    CAUSAL,
    EVERYWHERE,
    INSIDE,
    PROMPT,
    ROWS,
    call,
    frozen,
    p_tuned,
    padded,
    with_words,
)
from tests.stillroom.tiny import tiny_llama


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", BASES)
def test_prompt_of_words_equals_the_words_as_text(kind, side):
    base = frozen(kind)
    template = INSIDE if kind in CAUSAL else EVERYWHERE
    ids, mask = padded(ROWS, side)
    written = [with_words(row, template) for row in ROWS]
    expected_ids, expected_mask = padded(written, side)
    plain = call(base, ids, mask).logits
    expected = call(base, expected_ids, expected_mask).logits
    part = p_tuned(base, template)
    logits = call(base, ids, mask).logits
    part.wear(False)
    assert torch.equal(call(base, ids, mask).logits, plain)
    assert logits.shape == plain.shape
    assert not torch.allclose(logits, plain, atol=1e-3)
    for row, (words, text) in enumerate(zip(written, ROWS, strict=True)):
        if kind in BOTH_HALVES or logits.dim() == 2:
            torch.testing.assert_close(logits[row], expected[row], rtol=0, atol=1e-6)
            continue
        kept = [column for column, word in enumerate(words) if word in text]
        of_text = expected[row][expected_mask[row].bool()][kept]
        found = logits[row][mask[row].bool()]
        torch.testing.assert_close(found, of_text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BASES)
def test_prompt_tuning_starts_as_the_text_it_is_given(kind):
    base = frozen(kind)
    ids, mask = padded(ROWS, "right")
    part = PromptAdapter(base, PromptOptions(5, PROMPT[:2]), 0)
    part.wear(True)
    logits = call(base, ids, mask).logits
    part.wear(False)
    written = [[40, 41, 40, 41, 40, *row] for row in ROWS]
    expected = call(base, *padded(written, "right")).logits
    if kind not in BOTH_HALVES and logits.dim() == 3:
        expected = expected[:, 5:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_logits_are_those_of_peft():
    from peft import PromptTuningConfig, get_peft_model

    base, ids = tiny_llama(), padded(ROWS, "right")
    peft = get_peft_model(
        tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ).eval()
    part = PromptAdapter(base, PromptOptions(4), 0)
    part.wear(True)
    part.take({"embeddings": peft.get_prompt_embedding_to_save("default")})
    expected = peft(input_ids=ids[0], attention_mask=ids[1]).logits[:, 4:]
    real = ids[1].bool()
    # peft puts zeros' positions elsewhere only for padding.
    torch.testing.assert_close(call(base, *ids).logits[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["lstm", "mlp", None])
@pytest.mark.parametrize("kind", BASES)
def test_training_changes_the_prompt_alone(kind, encoder):
    base = frozen(kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids, mask = padded(ROWS, "right")
    plain = call(base, ids, mask).logits
    template = INSIDE if kind in CAUSAL else EVERYWHERE
    options = PTuningOptions(template, encoder, 8) if encoder else PromptOptions(3)
    part = PromptAdapter(base, options, 0).train()
    part.wear(True)
    optimizer = torch.optim.Adam(part.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        logits = call(base, ids, mask).logits
        labels = torch.arange(logits.shape[:-1].numel()) % 3
        loss = cross_entropy(logits.flatten(0, -2), labels)
        loss.backward()
        if not losses:
            assert all(each.grad.abs().sum() > 0 for each in part.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert all(each.grad is None for each in base.parameters())
    part.wear(False)
    assert torch.equal(call(base, ids, mask).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("kind", BOTH_HALVES)
def test_labels_of_a_decoder_are_its_own(kind):
    base = frozen(kind)
    ids, mask = padded(ROWS, "right")
    labels = torch.tensor([[5, 6, 7]] * 3)
    p_tuned(base, EVERYWHERE)
    output = base(input_ids=ids, attention_mask=mask, labels=labels)
    expected = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_hidden_states_and_chosen_logits_align_with_the_text():
    base = frozen("llama")
    p_tuned(base, INSIDE)
    ids, mask = padded(ROWS, "right")
    whole = call(base, ids, mask, output_hidden_states=True)
    assert [each.shape for each in whole.hidden_states] == [(3, 6, 32)] * 3
    torch.testing.assert_close(base.lm_head(whole.hidden_states[-1]), whole.logits)
    for count in (1, 4, 6, 9):
        last = call(base, ids, mask, logits_to_keep=count).logits
        torch.testing.assert_close(last, whole.logits[:, -count:])
    chosen = call(base, ids, mask, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(chosen, whole.logits[:, [1, 4]])
    assert torch.equal(base(ids, mask).logits, whole.logits)


def test_a_virtual_token_is_of_the_sentence_it_stands_in():
    base = frozen("bert")
    ids, mask = padded([[1, 11, 12, 2, 13, 14, 2]], "right")
    template = ((1, 1), (4, 2), (-1, 2))
    words = torch.tensor([[1, 40, 11, 12, 2, 41, 42, 13, 14, 2, 43, 44]])
    sentences = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    expected = call(base, words, torch.ones_like(words), token_type_ids=sentences).logits
    one = call(base, words, torch.ones_like(words)).logits
    p_tuned(base, template)
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    found = call(base, ids, mask, token_type_ids=types).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, one, atol=1e-4)


@pytest.mark.parametrize("options", [PromptOptions(4), PTuningOptions(INSIDE, "lstm", 8)])
def test_seed_decides_the_prompt_and_global_random_numbers_do_not(options):
    base = frozen("llama")

    def start(seed):
        torch.rand(seed + 1)
        return PromptAdapter(base, options, seed).tensors()["embeddings"]

    before = torch.random.get_rng_state()
    PromptAdapter(base, options, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))
    assert start(3).isfinite().all()


def test_prompt_starts_as_words_of_the_vocabulary():
    base = frozen("llama")
    start = PromptAdapter(base, PromptOptions(9), 0).tensors()["embeddings"]
    same = (start[:, None] == base.get_input_embeddings().weight).all(-1)  # (9, words)
    assert same.any(1).all()
    assert same.any(0).sum() > 3


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_saved_prompt_computes_the_same_without_its_encoder(encoder):
    base = frozen("llama")
    ids, mask = padded(ROWS, "right")
    options = PTuningOptions(INSIDE, encoder, 8)
    part = PromptAdapter(base, options, 0).eval()
    part.wear(True)
    expected = call(base, ids, mask).logits
    assert list(part.tensors()) == ["embeddings"]
    part.wear(False)
    other = PromptAdapter(base, options, 1)
    with pytest.raises(SourceError, match="do not fit"):
        other.take({"embeddings": torch.zeros(3, 32)})
    assert other.encoder is not None
    other.take(part.tensors())
    other.wear(True)
    assert torch.equal(call(base, ids, mask).logits, expected)
    assert [name for name, _ in other.named_parameters()] == ["embeddings"]


def test_encoder_runs_once_until_it_changes():
    base = frozen("llama")
    part = PromptAdapter(base, PTuningOptions(INSIDE, "mlp", 8), 0).eval()
    part.wear(True)
    runs = []
    part.encoder.register_forward_hook(lambda *_: runs.append(1))
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        first = call(base, ids, mask).logits
        call(base, ids, mask)
        assert len(runs) == 1
        part.encoder.inputs.add_(1)
        assert not torch.equal(call(base, ids, mask).logits, first)
    assert len(runs) == 2
    call(base, ids, mask).logits.sum().backward()
    assert part.encoder.inputs.grad.abs().sum() > 0


def test_detached_prompt_leaves_the_base_as_it_was():
    base = frozen("llama")
    ids, mask = padded(ROWS, "right")
    plain = call(base, ids, mask).logits
    part = p_tuned(base, INSIDE)
    part.detach()
    assert torch.equal(call(base, ids, mask).logits, plain)
    assert not base._forward_pre_hooks
    assert not base.get_input_embeddings()._forward_hooks


def test_half_precision_base_keeps_its_dtype():
    base = frozen("llama").bfloat16()
    part = PromptAdapter(base, PromptOptions(3, PROMPT[:3]), 0)
    part.wear(True)
    ids, mask = padded(ROWS, "right")
    found = call(base, ids, mask).logits
    part.wear(False)
    words = padded([[*PROMPT[:3], *row] for row in ROWS], "right")
    assert part.embeddings.dtype == torch.float32
    assert torch.equal(found, call(base, *words).logits[:, 3:])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_activations_made_again_give_the_same_gradients(kind):
    base = frozen(kind).train()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    part = PromptAdapter(base, PromptOptions(3), 0)
    part.wear(True)
    gradients = []
    for wanted in (False, True):
        with recomputing(base, wanted=wanted):
            call(base, *padded(ROWS, "right")).logits.square().sum().backward()
        gradients.append(part.embeddings.grad.clone())
        part.embeddings.grad = None
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
