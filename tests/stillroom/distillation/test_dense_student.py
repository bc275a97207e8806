import pytest
import torch
import transformers as tf

from stillroom.distillation.dense_student import count_choices, dense_student, is_mixture
from stillroom.distillation.student import initialise_student
from stillroom.errors import DataError, RecipeError
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama
from tests.stillroom.tiny_mixtures import VALUES, tiny_mixtral, tiny_qwen3_moe, tiny_switch

MIXTURES = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe, "switch": tiny_switch}
DENSE = {
    "mixtral": tf.MistralForCausalLM,
    "qwen3_moe": tf.Qwen3ForCausalLM,
    "switch": tf.T5ForConditionalGeneration,
}
NORMALISED = ["mixtral", "qwen3_moe"]
ONE_EXPERT = {"mixtral": {"num_experts_per_tok": 1}, "qwen3_moe": {"num_experts_per_tok": 1}}


@torch.no_grad()
def logits(model):
    rows = token_rows(padding=3)
    more = {}
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": rows.input_ids}
    output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **more)
    return output.logits[rows.attention_mask.bool()]


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "experts")}


def router(layer):
    return layer.router if hasattr(layer, "router") else layer.gate


def matrices(layer):
    """Each expert's matrices as a dense layer names them, (out, in)."""
    if isinstance(layer.experts, torch.nn.ModuleDict):
        return [
            {"wi": expert.wi.weight, "wo": expert.wo.weight} for expert in layer.experts.values()
        ]
    width = layer.experts.down_proj.shape[2]
    return [
        {"gate_proj": both[:width], "up_proj": both[width:], "down_proj": down}
        for both, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True)
    ]


@torch.no_grad()
def make_experts_equal(model):
    for layer in sparse_layers(model).values():
        first, *others = matrices(layer)
        for other in others:
            for name, matrix in other.items():
                matrix.copy_(first[name])
    return model


@torch.no_grad()
def always_choose(model, experts):
    """Make every router prefer `experts`, whatever its input: their logits are |x| sums."""
    for layer, expert in zip(sparse_layers(model).values(), experts, strict=True):
        gate = router(layer)
        gate.register_forward_pre_hook(lambda _, inputs: (inputs[0].abs(),))
        weight = gate.classifier.weight if hasattr(gate, "classifier") else gate.weight
        weight.copy_(torch.zeros_like(weight))
        weight[expert] = 5.0
    return model


@pytest.mark.parametrize("kind", NORMALISED)
def test_mixture_of_equal_experts_is_its_dense_student(kind):
    teacher = make_experts_equal(MIXTURES[kind]())
    student = dense_student(teacher, "mean")
    assert type(student) is DENSE[kind]
    assert logits(teacher).std() > 0.1
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_switch_scales_by_the_routers_probability():
    # A router that is sure multiplies by 1; one that knows nothing multiplies by 1 / experts.
    sure = always_choose(make_experts_equal(tiny_switch()), [1, 2, 0, 1])
    student = dense_student(sure, "mean")
    assert type(student) is tf.T5ForConditionalGeneration
    torch.testing.assert_close(logits(student), logits(sure), rtol=1e-5, atol=1e-5)
    unsure = make_experts_equal(tiny_switch())
    student = dense_student(unsure, "mean")
    with torch.no_grad():
        for name, layer in sparse_layers(unsure).items():
            layer.router.classifier.weight.zero_()
            student.get_submodule(name.replace("mlp", "DenseReluDense")).wo.weight.div_(3)
    torch.testing.assert_close(logits(student), logits(unsure), rtol=1e-5, atol=1e-5)


def test_without_normalised_weights_the_student_is_the_larger():
    teacher = make_experts_equal(tiny_qwen3_moe(norm_topk_prob=False))
    with torch.no_grad():
        for layer in sparse_layers(teacher).values():
            layer.gate.weight.zero_()  # 2 of 3 experts, 1/3 each
    student = dense_student(teacher, "mean")
    assert not torch.allclose(logits(student), logits(teacher), rtol=1e-2)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.down_proj.weight.mul_(2 / 3)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("experts", ["mean", "most_used"])
def test_every_weight_is_the_teachers(kind, experts):
    teacher = always_choose(MIXTURES[kind](**ONE_EXPERT.get(kind, {})), [2, 0, 1, 2])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = dense_student(teacher, experts, token_rows())
    state = {
        name.replace("DenseReluDense", "mlp"): value for name, value in student.state_dict().items()
    }
    for (name, layer), expert in zip(sparse_layers(teacher).items(), [2, 0, 1, 2], strict=True):
        theirs = matrices(layer)
        for matrix in theirs[0]:
            each = torch.stack([one[matrix] for one in theirs])
            expected = each.mean(0) if experts == "mean" else each[expert]
            torch.testing.assert_close(state.pop(f"{name}.{matrix}.weight"), expected)
    for name, value in state.items():
        assert torch.equal(value, before[name]), name
    assert {n for n in before if ".experts." not in n and "gate.weight" not in n and
            "router" not in n} == set(state)  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    shared = {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in student.parameters()
    }
    assert not shared
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_expert_that_is_always_chosen_is_the_most_used(kind):
    layers = [1, 2, 0, 1]
    teacher = always_choose(MIXTURES[kind](**ONE_EXPERT.get(kind, {})), layers)
    rows = token_rows(padding=3)
    counts = count_choices(teacher, rows, batch_rows=4)
    assert [int(count.argmax()) for count in counts.values()] == layers
    for count in counts.values():
        assert count.max() == count.sum() == rows.tokens


def test_choices_are_counted_by_the_routers_own_logits():
    teacher, rows = tiny_mixtral(), token_rows(padding=3)
    counts = count_choices(teacher, rows)
    with torch.no_grad():
        output = teacher(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            output_router_logits=True,
        )
    for count, each in zip(counts.values(), output.router_logits, strict=True):
        real = each.view(len(rows), -1, 3)[rows.attention_mask.bool()]
        # Of three experts the two best are all but the worst.
        worst = torch.bincount(real.argmin(-1), minlength=3)
        assert torch.equal(count, rows.tokens - worst)
        assert len(set(count.tolist())) > 1


def test_the_first_of_equally_used_experts_is_taken():
    teacher = tiny_mixtral(num_experts_per_tok=3)  # every token goes to every expert
    student = dense_student(teacher, "most_used", token_rows())
    first = teacher.model.layers[2].mlp.experts.down_proj[0]
    assert torch.equal(student.model.layers[2].mlp.down_proj.weight, first)


@pytest.mark.parametrize("kind", MIXTURES)
def test_dense_student_reloads_as_itself(kind, tmp_path):
    student = dense_student(MIXTURES[kind](), "mean")
    student.save_pretrained(tmp_path)
    auto = tf.AutoModelForSeq2SeqLM if kind == "switch" else tf.AutoModelForCausalLM
    reloaded = auto.from_pretrained(tmp_path).eval()
    assert type(reloaded) is DENSE[kind]
    assert torch.equal(logits(reloaded), logits(student))
    assert "expert" not in reloaded.config.to_json_string()


@pytest.mark.parametrize("kind", NORMALISED)
def test_the_window_of_attention_is_kept(kind, tmp_path):
    changes = {"sliding_window": 4} | ({"use_sliding_window": True} if kind != "mixtral" else {})
    teacher = make_experts_equal(MIXTURES[kind](**changes))
    wide = make_experts_equal(MIXTURES[kind]())
    assert not torch.allclose(logits(teacher), logits(wide), rtol=1e-2)
    student = dense_student(teacher, "mean")
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    dense_student(wide, "mean").save_pretrained(tmp_path)
    assert tf.AutoConfig.from_pretrained(tmp_path).sliding_window is None


@pytest.mark.parametrize("kind", NORMALISED)
def test_layers_are_chosen_of_the_dense_student(kind, tmp_path):
    student = initialise_student(dense_student(MIXTURES[kind](), "mean"), (0, 3))
    student.save_pretrained(tmp_path)
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(reloaded.model.layers) == 2
    assert torch.equal(logits(reloaded), logits(student))


def test_dense_layers_of_the_same_width_stay():
    teacher = make_experts_equal(tiny_qwen3_moe(mlp_only_layers=[1], moe_intermediate_size=48))
    student = dense_student(teacher, "mean")
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_dense_layers_of_another_width_are_refused(changes):
    with pytest.raises(RecipeError, match=r"experts are 24 wide .*, its dense layers 48"):
        dense_student(tiny_qwen3_moe(**changes), "mean")


def test_half_precision_is_averaged_in_single():
    teacher = tiny_mixtral().to(torch.bfloat16)
    student = dense_student(teacher, "mean")
    assert student.dtype == torch.bfloat16
    experts = teacher.model.layers[0].mlp.experts.down_proj
    expected = experts.float().mean(0).bfloat16()
    torch.testing.assert_close(student.model.layers[0].mlp.down_proj.weight, expected)


def test_other_mixtures_are_refused_by_name():
    values = VALUES | {"moe_intermediate_size": 24, "num_experts": 3}
    teacher = tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**values, shared_expert_intermediate_size=24)
    )
    with pytest.raises(RecipeError, match=r"Qwen2MoeForCausalLM.*MixtralForCausalLM"):
        dense_student(teacher, "mean")


def test_a_dense_teacher_is_refused():
    with pytest.raises(RecipeError, match="LlamaForCausalLM came, which has no experts"):
        dense_student(tiny_llama(), "mean")


def test_an_untied_switch_head_is_refused():
    with pytest.raises(RecipeError, match="a head of its own"):
        dense_student(tiny_switch(tie_word_embeddings=False), "mean")


def test_most_used_needs_rows():
    for rows in (None, token_rows(0)):
        with pytest.raises(DataError, match=r"data\.calibration_rows"):
            dense_student(tiny_mixtral(), "most_used", rows)


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_are_told_from_dense_models(kind):
    assert is_mixture(MIXTURES[kind]())
    assert not is_mixture(dense_student(MIXTURES[kind](), "mean"))
    assert not is_mixture(tiny_bert_classifier())
