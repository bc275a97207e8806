import pytest
import torch
import transformers as tf

from stillroom.data.examples import Examples
from stillroom.distillation import narrow
from stillroom.distillation.importance import measure_importance
from stillroom.distillation.narrow import Width, narrow_student
from stillroom.distillation.width_probe import find_axes
from stillroom.distillation.width_sizes import read_sizes
from stillroom.errors import DataError, RecipeError
from stillroom.models import load_model, save_model
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama, tiny_tokenizer
from tests.stillroom.tiny_widths import GROUPED, tiny_of

ROWS = token_rows(4, padding=3)
KINDS = [
    "llama", "qwen3", "gpt2", "bert", "qwen2", "mistral", "phi3", "gpt_neox", "modernbert", "opt",
]  # fmt: skip
FREE = ["llama", "qwen3", "mistral"]


@torch.no_grad()
def logits(model):
    output = model(input_ids=ROWS.input_ids, attention_mask=ROWS.attention_mask).logits
    return output if output.dim() == 2 else output[ROWS.attention_mask.bool()]


def importance_of(model):
    return measure_importance(model, find_axes(model), read_sizes(model.config), ROWS)


def rows_of(items, size):
    return torch.cat([torch.arange(size) + item * size for item in items.tolist()])


def largest(values, count):
    """The positions of the largest, ascending, by comparing all pairs."""
    values = values.tolist()
    kept = [i for i, v in enumerate(values) if sum(other > v for other in values) < count]
    return torch.tensor(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_as_wide_as_its_teacher_is_its_teacher(kind):
    teacher = tiny_of(kind)
    sizes = read_sizes(teacher.config)
    for width in (Width(), Width(sizes.hidden, sizes.intermediate, sizes.heads)):
        student = narrow_student(teacher, width, ROWS)
        assert type(student) is type(teacher)
        assert torch.equal(logits(student), logits(teacher))
        pointers = {p.data_ptr() for p in teacher.parameters()}
        assert not pointers & {p.data_ptr() for p in student.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_student_saves_and_loads_as_itself(kind, tmp_path):
    teacher = tiny_of(kind)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = narrow_student(teacher, Width(16, 20, 2), ROWS)
    sizes = read_sizes(student.config)
    assert (sizes.hidden, sizes.intermediate, sizes.heads) == (16, 20, 2)
    assert sizes.head_dim == read_sizes(teacher.config).head_dim
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())
    save_model(student, tiny_tokenizer(), tmp_path)
    classifies = "SequenceClassification" in type(student).__name__
    loaded = load_model(tmp_path, task="sequence_classification" if classifies else "causal_lm")
    assert type(loaded) is type(student)
    assert torch.equal(logits(loaded), logits(student))
    assert logits(student).std() > 0.01
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_kept_of_a_llama_or_qwen3(kind):
    teacher = tiny_of(kind)
    student = narrow_student(teacher, Width(24, 20, 2), ROWS)
    measured, dim = importance_of(teacher), read_sizes(teacher.config).head_dim
    c = largest(measured.channels, 24)
    for i, (old, new) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        n, g = largest(measured.neurons[i], 20), largest(measured.groups[i], 1)
        q, k = rows_of(g, 2 * dim), rows_of(g, dim)
        attention, expected = old.self_attn, new.self_attn
        assert torch.equal(expected.q_proj.weight, attention.q_proj.weight[q][:, c])
        assert torch.equal(expected.k_proj.weight, attention.k_proj.weight[k][:, c])
        assert torch.equal(expected.v_proj.weight, attention.v_proj.weight[k][:, c])
        assert torch.equal(expected.o_proj.weight, attention.o_proj.weight[c][:, q])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[n][:, c])
        assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[n][:, c])
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[c][:, n])
        assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[c])
        if kind == "qwen3":
            assert torch.equal(expected.q_norm.weight, attention.q_norm.weight)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, c])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, c])


def test_what_is_kept_of_a_gpt2():
    teacher = tiny_of("gpt2")
    student = narrow_student(teacher, Width(16, 20, 2), ROWS)
    measured = importance_of(teacher)
    c = largest(measured.channels, 16)
    for i, (old, new) in enumerate(zip(teacher.transformer.h, student.transformer.h, strict=True)):
        n, h = largest(measured.neurons[i], 20), rows_of(largest(measured.groups[i], 2), 8)
        fused = torch.cat([h, 32 + h, 64 + h])
        assert torch.equal(new.attn.c_attn.weight, old.attn.c_attn.weight[c][:, fused])
        assert torch.equal(new.attn.c_attn.bias, old.attn.c_attn.bias[fused])
        assert torch.equal(new.attn.c_proj.weight, old.attn.c_proj.weight[h][:, c])
        assert torch.equal(new.attn.c_proj.bias, old.attn.c_proj.bias[c])
        assert torch.equal(new.mlp.c_fc.weight, old.mlp.c_fc.weight[c][:, n])
        assert torch.equal(new.mlp.c_fc.bias, old.mlp.c_fc.bias[n])
        assert torch.equal(new.mlp.c_proj.weight, old.mlp.c_proj.weight[n][:, c])
        assert torch.equal(new.ln_1.bias, old.ln_1.bias[c])
    assert torch.equal(student.transformer.wpe.weight, teacher.transformer.wpe.weight[:, c])
    assert student.lm_head.weight is student.transformer.wte.weight


def test_what_is_kept_of_a_bert():
    teacher = tiny_of("bert")
    student = narrow_student(teacher, Width(16, 20, 2), ROWS)
    measured = importance_of(teacher)
    c = largest(measured.channels, 16)
    pairs = zip(teacher.bert.encoder.layer, student.bert.encoder.layer, strict=True)
    for i, (old, new) in enumerate(pairs):
        n, h = largest(measured.neurons[i], 20), rows_of(largest(measured.groups[i], 2), 8)
        for name in ("query", "key", "value"):
            into, narrow_into = (getattr(each.attention.self, name) for each in (old, new))
            assert torch.equal(narrow_into.weight, into.weight[h][:, c])
            assert torch.equal(narrow_into.bias, into.bias[h])
        joining = old.attention.output.dense
        assert torch.equal(new.attention.output.dense.weight, joining.weight[c][:, h])
        assert torch.equal(new.intermediate.dense.weight, old.intermediate.dense.weight[n][:, c])
        assert torch.equal(new.output.dense.weight, old.output.dense.weight[c][:, n])
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight[c][:, c])
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, c])


# The layers into and out of the neurons, as (neurons, …) and (…, neurons).
FEED_FORWARD = {
    "llama": lambda m: [layer.mlp.up_proj for layer in m.model.layers],
    "qwen3": lambda m: [layer.mlp.up_proj for layer in m.model.layers],
    "gpt2": lambda m: [layer.mlp.c_fc for layer in m.transformer.h],
    "bert": lambda m: [layer.intermediate.dense for layer in m.bert.encoder.layer],
}


@pytest.mark.parametrize("kind", FEED_FORWARD)
@torch.no_grad()
def test_dead_neurons_go_and_nothing_else_changes(kind):
    teacher = tiny_of(kind)
    total = read_sizes(teacher.config).intermediate
    for seed, layer in enumerate(FEED_FORWARD[kind](teacher)):
        dead = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: total // 4]
        weight = layer.weight.T if kind == "gpt2" else layer.weight
        weight[dead] = 0
        if layer.bias is not None:
            layer.bias[dead] = 0
    student = narrow_student(teacher, Width(intermediate_size=total - total // 4), ROWS)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FREE)
@torch.no_grad()
def test_dead_heads_go_and_nothing_else_changes(kind):
    teacher = tiny_of(kind)
    dim = read_sizes(teacher.config).head_dim
    for i, layer in enumerate(teacher.model.layers):
        dead = slice(dim * (i % 2), dim * (i % 2) + dim)  # another group in each block
        layer.self_attn.v_proj.weight[dead] = 0
    student = narrow_student(teacher, Width(attention_heads=2), ROWS)
    assert student.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FREE)
@torch.no_grad()
def test_dead_channels_go_and_only_the_norms_change(kind):
    teacher = tiny_of(kind)
    dead = torch.tensor([1, 2, 7, 11, 19, 23, 28, 31])
    teacher.model.embed_tokens.weight[:, dead] = 0
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.down_proj.weight[dead] = 0
    student = narrow_student(teacher, Width(hidden_size=24), ROWS)
    norms = [p for name, p in student.named_parameters() if p.shape == (24,)]
    assert len(norms) == 5
    for weight in norms:
        weight.mul_((32 / 24) ** 0.5)  # the mean square is over 24 channels, not 32
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained_llama():
    """A model that has learnt that each token is followed by three times itself and one."""
    model = tiny_llama()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for seed in range(80):
        ids = sequences(seed).input_ids
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def sequences(seed):
    ids = [torch.randint(64, (16,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(11):
        ids.append((3 * ids[-1] + 1) % 64)
    ids = torch.stack(ids, 1)
    return Examples(ids, torch.ones_like(ids), ids, torch.arange(16), "a" * 64)


@pytest.mark.parametrize("width", [Width(28), Width(None, 32), Width(24, 32, 2)])
def test_important_parts_keep_more_than_random_ones(trained_llama, width, monkeypatch):
    rows = sequences(100)

    @torch.no_grad()
    def loss(model):
        return float(model(input_ids=rows.input_ids, labels=rows.input_ids).loss)

    important = loss(narrow_student(trained_llama, width, rows))
    generator = torch.Generator().manual_seed(2)
    monkeypatch.setattr(
        narrow, "_largest", lambda v, n: torch.randperm(len(v), generator=generator)[:n].sort()[0]
    )
    random = [loss(narrow_student(trained_llama, width, rows)) for _ in range(6)]
    assert loss(trained_llama) < important < sum(random) / len(random)
    if width.intermediate_size is not None:
        assert important < min(random)


@pytest.mark.parametrize(
    ("width", "why"),
    [
        (Width(hidden_size=0), "student.hidden_size: expected 1 to 32, .* got 0"),
        (Width(hidden_size=40), "student.hidden_size: expected 1 to 32, .* got 40"),
        (Width(intermediate_size=65), "student.intermediate_size: expected 1 to 64"),
        (Width(intermediate_size=-1), "student.intermediate_size: expected 1 to 64"),
        (Width(attention_heads=8), "student.attention_heads: expected 1 to 4"),
        (Width(attention_heads=3), "student.attention_heads: expected a multiple of 2"),
        (Width(hidden_size=30), "LlamaConfig allows no model with 30 channels"),
    ],
)
def test_widths_that_cannot_be_are_refused(width, why):
    with pytest.raises(RecipeError, match=why):
        narrow_student(tiny_llama(), width, ROWS)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2", "phi3"])
@pytest.mark.parametrize("width", [Width(16), Width(attention_heads=2), Width(24, None, 2)])
def test_heads_keep_their_channels(kind, width):
    with pytest.raises(RecipeError, match="hidden_size / attention_heads channels a head"):
        narrow_student(tiny_of(kind), width, ROWS)


def test_without_rows_it_is_refused():
    with pytest.raises(DataError, match="there are none"):
        narrow_student(tiny_bert_classifier(), Width(), ROWS.take(slice(0)))


def test_a_student_can_be_narrower_in_bfloat16():
    config = tf.LlamaConfig(**GROUPED, dtype="bfloat16")
    teacher = tf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    student = narrow_student(teacher, Width(24, 20, 2), ROWS)
    assert student.dtype == torch.bfloat16
    assert logits(student).isfinite().all()
