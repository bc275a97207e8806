import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from stillroom.checkpoint import FolderCheckpoints, sha256_of
from stillroom.distillation import elias_fano
from stillroom.distillation.cache_files import sparse_bytes
from stillroom.distillation.losses import DenseTargets, soft_kl
from stillroom.distillation.teacher_cache import CacheOptions, TeacherCache, capture
from stillroom.errors import (
    CorruptedError,
    DataError,
    MismatchError,
    NotFiniteError,
    RecipeError,
    SourceError,
)
from tests.stillroom.rows import TOKENIZER, labelled_rows, token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_bert_masked, tiny_llama
from tests.stillroom.tiny_decoders import tiny_gpt2

VOCAB = 64
TEACHER = tiny_llama()
OPTIONS = CacheOptions(rows_per_shard=2, batch_rows=2)


class Stopped(Exception):
    pass


def captured(folder, options=OPTIONS, examples=None, **further):
    return capture(
        TEACHER,
        token_rows(5, padding=3) if examples is None else examples,
        folder,
        options,
        tokenizer_hash=TOKENIZER,
        fingerprint="tiny",
        **further,
    )


def dense(targets):
    full = torch.zeros(*targets.ids.shape[:2], VOCAB)
    return full.scatter_add_(2, targets.ids, targets.probabilities)


def teacher_distribution(examples, temperature=1.0):
    with torch.no_grad():
        logits = TEACHER(
            input_ids=examples.input_ids, attention_mask=examples.attention_mask
        ).logits
    return torch.softmax(logits / temperature, -1)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SEEDS = 300
FALSE_ALARM = 1e-6
"""How often, at most, targets without bias would fail the test of their mean."""


def excess_of_the_mean(tmp_path, options, examples):
    """Return how far the mean of the targets over SEEDS seeds is from p, over what chance allows.

    Every word of every position at once is within 1 but for a share FALSE_ALARM of all choices of
    seeds: Bernstein's inequality for sums of independent bounded numbers, over all words, with the
    exact variances of the draws and of the rounding to float16.
    """
    length = examples.input_ids.shape[1]
    total = torch.zeros(1, length, VOCAB, dtype=torch.float64)
    for seed in range(SEEDS):
        cache = captured(tmp_path, replace(options, seed=seed), examples)
        total += dense(cache.targets(torch.arange(1)))
    p = teacher_distribution(examples, options.temperature)
    return (total[0] - SEEDS * p[0].double()).abs() / bound_of_sums(p[0], options)


def bound_of_sums(p, options):
    """Return x (length, vocab) that solves P(|sum| ≥ x) ≤ 2 exp(−x² / 2(V + b x / 3))."""
    variance, largest = drawn_variance(p, options)
    log = math.log(2 * p.numel() / FALSE_ALARM)
    third = largest * log / 3
    return third + (third**2 + 2 * log * SEEDS * variance).sqrt()


def drawn_variance(p, options):
    """Return variance and largest deviation (length, vocab) of a target, word by word, slowly."""
    variance = torch.zeros(p.shape, dtype=torch.float64)
    largest = torch.zeros(p.shape, dtype=torch.float64)
    for position, row in enumerate(p):
        head = row.topk(options.head).indices.tolist()
        tail = row.clone()
        tail[head] = 0
        cumulative = tail.cumsum(-1, dtype=torch.float64)
        mass = cumulative[-1].item()
        low, high = halves(mass)
        rounding = (mass - low) * (high - mass)
        before = 0.0
        for word, after in enumerate((cumulative / mass * options.draws).tolist()):
            if word in head:
                down, up = halves(row[word].item())
                variance[position, word] = (row[word] - down) * (up - row[word])
                largest[position, word] = up - down
            else:
                # Draw j is uniform on [j, j + 1]: it hits the word by the share that overlaps.
                hits = [max(0.0, min(after, j + 1) - max(before, j)) for j in range(options.draws)]
                mean = sum(hits)
                spread = sum(hit * (1 - hit) for hit in hits)
                square = (mass**2 + rounding) * (spread + mean**2) - (mass * mean) ** 2
                variance[position, word] = square / options.draws**2
                most = sum(hit > 0 for hit in hits)
                largest[position, word] = high * max(most, mean) / options.draws
            before = after
    return variance, largest


def halves(value):
    """Return the float16 numbers below and above `value`."""
    nearest = np.float16(value)
    down = nearest if float(nearest) <= value else np.nextafter(nearest, np.float16(-1))
    return float(down), float(np.nextafter(down, np.float16(np.inf)))


@pytest.mark.parametrize("head", [0, 4])
def test_mean_over_draws_is_the_teachers_distribution(tmp_path, head):
    options = replace(OPTIONS, head=head, temperature=1.5)
    excess = excess_of_the_mean(tmp_path, options, token_rows(1, 6))
    assert excess.max() <= 1
    # A bound that allows all would show nothing: chance takes a good part of it.
    assert excess.max() > 0.3


def test_mean_of_the_rounded_entropy_is_the_teachers(tmp_path):
    examples = token_rows(1, 12)
    p = teacher_distribution(examples)
    exact = torch.special.entr(p).sum(-1)[0].double()
    total = torch.zeros_like(exact)
    for seed in range(SEEDS):
        cache = captured(tmp_path, replace(OPTIONS, seed=seed), examples)
        total += cache.targets(torch.arange(1)).entropy[0]
    # Hoeffding's inequality: each number is one of two neighbours.
    steps = torch.tensor([up - down for down, up in map(halves, exact.tolist())])
    bound = steps * math.sqrt(SEEDS / 2 * math.log(2 * len(exact) / FALSE_ALARM))
    assert ((total - SEEDS * exact).abs() <= bound).all()
    # Rounding to nearest, at the same position for every seed, would not pass.
    assert (SEEDS * (exact.half() - exact).abs() > bound).any()


def test_mean_of_top_k_is_not_the_teachers_distribution(tmp_path):
    # As many words, and the bound that the draws' own variance would allow.
    examples, drawn = token_rows(1, 6), replace(OPTIONS, temperature=1.5)
    top = replace(drawn, kind="top_k", head=12, draws=0)
    cache = captured(tmp_path, top, examples)
    p = teacher_distribution(examples, 1.5)
    gap = SEEDS * (dense(cache.targets(torch.arange(1)))[0] - p[0]).abs()
    assert (gap / bound_of_sums(p[0], drawn)).max() > 3


def test_divergence_from_top_k_is_zero_for_its_targets_and_never_less(tmp_path):
    examples, rows = token_rows(4), torch.arange(4)
    cache = captured(tmp_path, replace(OPTIONS, kind="top_k", head=12, draws=0), examples)
    targets, labels = cache.targets(rows), torch.zeros(4, 12, dtype=torch.long)
    p = teacher_distribution(examples)
    exact = (dense(targets) + 1e-30).log()
    assert soft_kl(exact, targets, labels).item() == pytest.approx(0, abs=1e-5)
    lost = -p.topk(12).values.sum(-1).log().mean().item()
    assert lost > 0.1
    # Probabilities in float16 sum to 1 within 2^-11.
    assert soft_kl(p.log(), targets, labels).item() == pytest.approx(lost, abs=2e-3)


def test_top_k_is_biased_and_sampling_is_not(tmp_path):
    examples = token_rows(6, 12)
    expected = teacher_distribution(examples)
    rows = torch.arange(6)
    top = captured(tmp_path / "a", replace(OPTIONS, kind="top_k", head=12), examples)
    drawn = captured(tmp_path / "b", examples=examples)
    # Mass given to the words that the teacher likes least: none at all, or as much as it gave.
    rare = expected < expected.topk(12).values[..., -1:]
    mass = expected[rare].sum()
    assert dense(top.targets(rows))[rare].sum() == 0
    assert dense(drawn.targets(rows))[rare].sum() == pytest.approx(mass.item(), rel=0.15)
    torch.testing.assert_close(
        top.targets(rows).probabilities.sum(-1), torch.ones(6, 12), rtol=2e-3, atol=0
    )


def test_targets_are_read_by_row_and_padding_is_empty(tmp_path):
    examples = token_rows(5, padding=3)
    cache = captured(tmp_path)
    whole = cache.targets(torch.arange(5))
    part = cache.targets(torch.tensor([4, 1, 1]))
    assert torch.equal(part.ids, whole.ids[[4, 1, 1]])
    assert torch.equal(part.probabilities, whole.probabilities[[4, 1, 1]])
    padding = examples.attention_mask == 0
    assert padding.any()
    assert (whole.probabilities[padding] == 0).all()
    assert (whole.entropy[padding] == 0).all()
    sums = whole.probabilities.sum(-1)[~padding]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=3e-3, atol=0)
    p = teacher_distribution(examples)
    entropy = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(whole.entropy[~padding], entropy[~padding], rtol=2**-10, atol=0)
    assert whole.entropy.dtype == torch.float32


def test_default_costs_at_most_forty_bytes_a_token(tmp_path):
    words = 49_152  # SmolLM2's
    examples = token_rows(16, 120, vocab=words)
    cache = capture(
        tiny_llama(vocab=words), examples, tmp_path, CacheOptions(), tokenizer_hash=TOKENIZER
    )
    assert sparse_bytes(2, 16, words) == 39
    assert 39 <= cache.bytes_per_token <= 40


@pytest.mark.parametrize(("head", "draws"), [(2, 16), (0, 5), (3, 0)])
def test_sparse_bytes_are_those_of_the_tensors(tmp_path, head, draws):
    kind = "sampled" if draws else "top_k"
    captured(tmp_path, replace(OPTIONS, kind=kind, head=head, draws=draws), token_rows(2))
    tensors = load_file(tmp_path / "shard-00000.safetensors").values()
    assert sum(tensor.nbytes for tensor in tensors) == 2 * 12 * sparse_bytes(head, draws, VOCAB)


def test_dense_cache_holds_the_logits(tmp_path):
    examples = token_rows(5)
    cache = captured(tmp_path, replace(OPTIONS, kind="dense"), examples)
    targets = cache.targets(torch.tensor([3, 0]))
    assert isinstance(targets, DenseTargets)
    expected = teacher_distribution(examples)[[3, 0]]
    torch.testing.assert_close(torch.softmax(targets.logits, -1), expected)


def test_classifier_keeps_its_logits(tmp_path):
    teacher, examples = tiny_bert_classifier(), labelled_rows(5)
    cache = capture(teacher, examples, tmp_path, OPTIONS, tokenizer_hash=TOKENIZER)
    with torch.no_grad():
        expected = teacher(input_ids=examples.input_ids).logits
    torch.testing.assert_close(cache.targets(torch.arange(5)).logits, expected)


def test_rows_of_one_length_are_asked_together_and_kept_in_their_own_order(tmp_path):
    teacher, examples = tiny_bert_classifier(), labelled_rows(8, length=32)
    mask = torch.arange(32) < torch.tensor([30, 5, 31, 6, 29, 7, 32, 8])[:, None]
    examples = replace(examples, input_ids=examples.input_ids * mask, attention_mask=mask.long())
    asked = []
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    options = replace(OPTIONS, rows_per_shard=8, batch_rows=4)
    cache = capture(teacher, examples, tmp_path, options, tokenizer_hash=TOKENIZER)
    assert asked == [(4, 8), (4, 32)]
    with torch.no_grad():
        expected = teacher(
            input_ids=examples.input_ids, attention_mask=examples.attention_mask
        ).logits
    torch.testing.assert_close(cache.targets(torch.arange(8)).logits, expected)


def test_rerun_and_resume_give_the_same_bytes(tmp_path):
    captured(tmp_path / "whole")
    captured(tmp_path / "again")
    assert files(tmp_path / "whole") == files(tmp_path / "again")
    checkpoints = FolderCheckpoints(tmp_path / "pieces")

    def stop(done, total, unit, note=""):
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        captured(tmp_path / "killed", checkpoints=checkpoints, progress=stop)
    assert checkpoints.names() == ["shard-00000", "shard-00001"]
    with pytest.raises(SourceError, match="no teacher cache"):
        TeacherCache.open(tmp_path / "killed")
    asked = []
    teacher = tiny_llama()
    teacher.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    capture(
        teacher,
        token_rows(5, padding=3),
        tmp_path / "resumed",
        OPTIONS,
        tokenizer_hash=TOKENIZER,
        fingerprint="tiny",
        checkpoints=checkpoints,
    )
    assert asked == [1]  # the last shard's only row
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_draws_differ_by_seed_and_not_by_neighbours(tmp_path):
    examples = token_rows(4)
    one = captured(tmp_path / "a", examples=examples).targets(torch.arange(4))
    other = captured(tmp_path / "b", replace(OPTIONS, seed=1), examples).targets(torch.arange(4))
    assert not torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.entropy, other.entropy, rtol=2**-10, atol=0)
    alone = captured(tmp_path / "c", examples=examples.take(slice(2, 4))).targets(torch.arange(2))
    assert torch.equal(alone.ids, one.ids[2:])


def test_checkpoint_of_another_capture_is_refused(tmp_path):
    checkpoints = FolderCheckpoints(tmp_path / "pieces")
    captured(tmp_path / "a", checkpoints=checkpoints)
    with pytest.raises(MismatchError, match=r"temperature was 1\.0 and is 2\.0"):
        captured(tmp_path / "b", replace(OPTIONS, temperature=2.0), checkpoints=checkpoints)
    with pytest.raises(MismatchError, match="rows was"):
        captured(tmp_path / "b", examples=token_rows(5, seed=1), checkpoints=checkpoints)


def test_reader_refuses_what_the_cache_is_not_for(tmp_path):
    examples = token_rows(5)
    cache = captured(tmp_path, examples=examples)
    cache.check(examples, 1.0)
    with pytest.raises(MismatchError, match="another tokenizer"):
        cache.check(replace(examples, tokenizer_hash="b" * 64), 1.0)
    with pytest.raises(MismatchError, match=r"sequence length: .* 12, 10 came"):
        cache.check(token_rows(5, 10), 1.0)
    with pytest.raises(MismatchError, match=r"another temperature: .* 1\.0, 2\.0 came"):
        cache.check(examples, 2.0)
    with pytest.raises(MismatchError, match="number of rows"):
        cache.check(examples.take(slice(0, 4)), 1.0)
    with pytest.raises(MismatchError, match="row 0 holds other tokens"):
        cache.check(examples.take(torch.tensor([1, 0, 2, 3, 4])), 1.0)


def test_capture_refuses_bad_input(tmp_path):
    examples = token_rows(5)
    with pytest.raises(MismatchError, match="tokenizer"):
        capture(tiny_llama(), examples, tmp_path, OPTIONS, tokenizer_hash="b" * 64)
    with pytest.raises(DataError, match="at least one row"):
        captured(tmp_path, examples=examples.take(slice(0, 0)))
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        capture(broken, examples, tmp_path, OPTIONS, tokenizer_hash=TOKENIZER)
    with pytest.raises(RecipeError, match="temperature must be above 0"):
        CacheOptions(temperature=0)
    with pytest.raises(RecipeError, match="draws >= 1"):
        CacheOptions(draws=0)


def test_damaged_cache_is_refused(tmp_path):
    captured(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptedError, match=r"shard-00001\.safetensors"):
        TeacherCache.open(tmp_path)
    shard.write_bytes(content[:-1])
    with pytest.raises(CorruptedError, match=r"shard-00001\.safetensors"):
        TeacherCache.open(tmp_path)
    shard.unlink()
    with pytest.raises(CorruptedError, match="missing"):
        TeacherCache.open(tmp_path)


def test_audit_holds_the_logits_of_the_first_rows_and_changes_no_shard(tmp_path):
    examples = token_rows(5, padding=3)
    plain = captured(tmp_path / "plain")
    options = replace(OPTIONS, audit_rows=3, temperature=1.0)
    cache = captured(tmp_path / "audited", options)
    whole, audited = files(tmp_path / "plain"), files(tmp_path / "audited")
    assert audited.keys() - whole.keys() == {"audit.safetensors"}
    assert all(audited[name] == whole[name] for name in whole if name.startswith("shard-"))
    assert cache.bytes_per_token == plain.bytes_per_token
    assert cache.audit_bytes == len(audited["audit.safetensors"])
    assert cache.facts.audit_rows == 3
    p = teacher_distribution(examples)
    for row in range(3):
        real = examples.attention_mask[row] == 1
        logits = cache.audit_logits(row)
        torch.testing.assert_close(torch.softmax(logits[real], -1), p[row, real])
        assert (logits[~real] == 0).all()
    assert header(tmp_path / "audited" / "audit.safetensors") == {"logits": ("F32", [3, 12, VOCAB])}
    damaged = bytearray(audited["audit.safetensors"])
    damaged[-1] ^= 1
    (tmp_path / "audited" / "audit.safetensors").write_bytes(bytes(damaged))
    with pytest.raises(CorruptedError, match=r"audit\.safetensors"):
        TeacherCache.open(tmp_path / "audited")


def test_audit_is_a_piece_of_its_own_and_at_most_all_rows(tmp_path):
    checkpoints = FolderCheckpoints(tmp_path / "pieces")
    options = replace(OPTIONS, audit_rows=99)
    cache = captured(tmp_path / "a", options, checkpoints=checkpoints)
    assert cache.facts.audit_rows == 5
    assert checkpoints.names() == ["audit", "shard-00000", "shard-00001", "shard-00002"]
    checkpoints.delete("audit")
    captured(tmp_path / "b", options, checkpoints=checkpoints)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert captured(tmp_path / "c", replace(options, kind="dense")).facts.audit_rows == 0


@pytest.mark.parametrize("teacher", [TEACHER, tiny_gpt2(), tiny_bert_masked()])
@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_hidden_states_are_the_last_ones(tmp_path, teacher, kind):
    examples = token_rows(5, padding=3)
    options = replace(OPTIONS, kind=kind, hidden_states="last", audit_rows=1)
    cache = capture(teacher, examples, tmp_path, options, tokenizer_hash=TOKENIZER)
    rows = torch.tensor([4, 1])
    with torch.no_grad():
        part = examples.take(rows)
        expected = teacher.base_model(
            input_ids=part.input_ids, attention_mask=part.attention_mask
        ).last_hidden_state
    expected = expected * part.attention_mask.unsqueeze(-1)
    hidden = cache.hidden(rows)
    assert hidden.shape == (2, 12, cache.facts.hidden_size)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)
    assert header(tmp_path / "shard-00000.safetensors")["hidden"] == ("F16", [2, 12, 32])


def test_hidden_states_that_are_not_there_or_too_large_are_refused(tmp_path):
    with pytest.raises(MismatchError, match="holds no hidden states"):
        captured(tmp_path).hidden(torch.arange(1))
    loud = tiny_llama()
    loud.model.norm.weight.data *= 1e5
    loud.lm_head.weight = torch.nn.Parameter(torch.zeros_like(loud.lm_head.weight))
    options = replace(OPTIONS, hidden_states="last")
    with pytest.raises(NotFiniteError, match="beyond float16"):
        capture(loud, token_rows(2), tmp_path / "b", options, tokenizer_hash=TOKENIZER)


def test_masked_language_model_is_kept_position_by_position(tmp_path):
    teacher, examples = tiny_bert_masked(), token_rows(3, padding=2)
    labels = torch.full_like(examples.labels, -100)
    labels[:, 4] = examples.input_ids[:, 4]
    masked = replace(examples, labels=labels, masked=True)
    options = replace(OPTIONS, kind="top_k", head=VOCAB)
    cache = capture(teacher, masked, tmp_path, options, tokenizer_hash=TOKENIZER)
    with torch.no_grad():
        logits = teacher(input_ids=masked.input_ids, attention_mask=masked.attention_mask).logits
    expected = torch.softmax(logits, -1) * masked.attention_mask.unsqueeze(-1)
    found = dense(cache.targets(torch.arange(3)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def rewrite(folder, version, entropy, ids):
    """Make the cache in `folder` one of an earlier version, its words plain, of the type `ids`.

    `entropy` (rows, length) float32 was kept whole before version 3.
    """
    facts = json.loads((folder / "cache.json").read_text()) | {"format_version": version}
    if version == 1:
        for name in ("audit_rows", "hidden_states", "hidden_size"):
            del facts[name]
    parts = entropy.split(facts["rows_per_shard"])
    for name, part in zip(sorted(facts["shards"]), parts, strict=True):
        arrays = load_file(folder / name)
        for words, count in (("head", facts["head"]), ("tail", facts["draws"])):
            plain = elias_fano.decode(arrays.pop(f"{words}_words"), count, VOCAB)
            arrays[f"{words}_ids"] = plain.astype(ids)
        if version < 3:
            arrays["entropy"] = part.numpy()
        save_file(arrays, folder / name)
        facts["shards"][name] = sha256_of(folder / name)
    (folder / "cache.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("version", "ids"), [(1, np.uint16), (2, np.uint16), (3, np.uint16), (3, np.int32)]
)
def test_a_cache_of_an_earlier_format_is_read(tmp_path, version, ids):
    rows = torch.arange(5)
    today = captured(tmp_path).targets(rows)
    entropy = torch.special.entr(teacher_distribution(token_rows(5, padding=3))).sum(-1)
    rewrite(tmp_path, version, entropy, ids)
    plain = "U16" if ids is np.uint16 else "I32"
    assert header(tmp_path / "shard-00000.safetensors") == {
        "head_ids": (plain, [2, 12, 2]),
        "head_probabilities": ("F16", [2, 12, 2]),
        "tail_ids": (plain, [2, 12, 16]),
        "tail_mass": ("F16", [2, 12]),
        "entropy": ("F32" if version < 3 else "F16", [2, 12]),
    }
    cache = TeacherCache.open(tmp_path)
    assert (cache.facts.format_version, cache.facts.audit_rows) == (version, 0)
    found = cache.targets(rows)
    assert torch.equal(found.entropy, entropy if version < 3 else today.entropy)
    assert torch.equal(found.ids, today.ids)
    assert torch.equal(found.probabilities, today.probabilities)


def test_a_cache_of_a_later_format_is_refused(tmp_path):
    captured(tmp_path)
    facts = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(facts | {"format_version": 5}))
    with pytest.raises(MismatchError, match="has format 5"):
        TeacherCache.open(tmp_path)


def header(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    entries.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def test_layout_is_the_documented_one(tmp_path):
    captured(tmp_path)
    assert header(tmp_path / "shard-00000.safetensors") == {
        "head_words": ("U8", [2, 12, 2]),
        "head_probabilities": ("F16", [2, 12, 2]),
        "tail_words": ("U8", [2, 12, 8]),
        "tail_mass": ("F16", [2, 12]),
        "entropy": ("F16", [2, 12]),
    }
