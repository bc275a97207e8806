import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from stillroom.distillation.dense_student import count_choices, dense_student, mixture_layers
from stillroom.errors import RecipeError
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_llama

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None, rope_theta=1234.0)
    )


def qwen3_moe(**changes):
    entries = SHAPE | {"intermediate_size": 80, "head_dim": 8, "norm_topk_prob": True} | changes
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**entries, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
    )


def switch():
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config)


KINDS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "switch": switch}


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind]().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model):
    ids = token_rows().input_ids
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **decoder).logits


@torch.no_grad()
def make_experts_equal(model):
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        elif ".expert_" in name:
            layer, _, part = name.rpartition(".expert_")
            parameter.copy_(model.get_parameter(f"{layer}.expert_0{part[1:]}"))


@torch.no_grad()
def always_choose(model, expert):
    """Let every router prefer one expert, whatever the token."""
    for router in mixture_layers(model).values():
        router.register_forward_pre_hook(
            lambda module, arguments: (torch.ones_like(arguments[0]), *arguments[1:])
        )
        weight = getattr(router, "weight", None)
        weight = router.classifier.weight if weight is None else weight
        weight.zero_()
        weight[expert] = 10.0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["mean", "most_used"])
def test_equal_experts_give_exactly_their_dense_student(kind, experts):
    teacher = made(kind)
    make_experts_equal(teacher)
    counts = count_choices(teacher, token_rows())
    student = dense_student(teacher, experts, counts)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_a_switch_with_equal_experts_and_a_sure_router_gives_exactly_its_dense_student():
    teacher = made("switch")
    make_experts_equal(teacher)
    # A router that is sure passes on the expert's output times 1.
    always_choose(teacher, 2)
    student = dense_student(teacher)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_used_expert_is_the_one_that_is_always_chosen(kind):
    teacher, rows = made(kind), token_rows()
    always_choose(teacher, 2)
    counts = count_choices(teacher, rows)
    assert list(counts) == list(mixture_layers(teacher))
    for each in counts.values():
        assert each.argmax() == 2
        assert each[2] == rows.tokens
    state = dense_student(teacher, "most_used", counts).state_dict()
    theirs = teacher.state_dict()
    if kind == "switch":
        name = "encoder.block.1.layer.1"
        expected = theirs[f"{name}.mlp.experts.expert_2.wo.weight"]
        assert torch.equal(state[f"{name}.DenseReluDense.wo.weight"], expected)
    else:
        expected = theirs["model.layers.1.mlp.experts.down_proj"][2]
        assert torch.equal(state["model.layers.1.mlp.down_proj.weight"], expected)


def test_the_student_has_the_number_format_of_its_teacher():
    student = dense_student(made("mixtral").to(torch.bfloat16))
    assert {each.dtype for each in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_saves_and_loads_and_owns_its_memory(kind, tmp_path):
    teacher = made(kind)
    student = dense_student(teacher)
    assert not mixture_layers(student)
    theirs = {each.data_ptr() for each in teacher.parameters()}
    assert not theirs & {each.data_ptr() for each in student.parameters()}
    student.save_pretrained(tmp_path)
    loader = AutoModelForSeq2SeqLM if kind == "switch" else AutoModelForCausalLM
    again = loader.from_pretrained(tmp_path).eval()
    assert type(again) is type(student)
    assert torch.equal(logits(again), logits(student))


def test_padding_is_not_counted():
    teacher, rows = made("mixtral"), token_rows()
    rows.attention_mask[:, -2:] = 0
    counts = count_choices(teacher, rows)
    assert all(each.sum() == 2 * rows.tokens for each in counts.values())


def test_what_has_no_dense_counterpart_is_refused():
    with pytest.raises(RecipeError, match="LlamaForCausalLM came"):
        dense_student(tiny_llama())
    with pytest.raises(RecipeError, match="most_used needs the router's choices"):
        dense_student(made("mixtral"), "most_used")
    with pytest.raises(RecipeError, match="of another width than the experts"):
        dense_student(qwen3_moe(mlp_only_layers=[0]))
