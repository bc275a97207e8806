import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from stillroom.blocks import find_blocks
from stillroom.distillation.narrow import Width, narrow_student
from stillroom.distillation.student import choose_layers, initialise_student, load_student
from stillroom.errors import RecipeError
from stillroom.models import load_model, save_model
from stillroom.streamed import open_streamed
from tests.stillroom.rows import token_rows
from tests.stillroom.tiny import tiny_bert_classifier, tiny_llama, tiny_masked_tokenizer
from tests.stillroom.tiny_decoders import tiny_diffllama, tiny_gpt2, tiny_gpt_neo, tiny_qwen2
from tests.stillroom.tiny_masked import MASKED
from tests.stillroom.tiny_mixtures import tiny_qwen3_moe, tiny_switch

# What they compute depends on a layer's number.
NUMBERED = {
    "diffllama": tiny_diffllama,
    "scaled gpt2": lambda: tiny_gpt2(scaled_by_layer=True),
    "gpt neo": tiny_gpt_neo,
}
DECODERS = {"llama": lambda: tiny_llama(layers=4), "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}
MODELS = DECODERS | {"bert": lambda: tiny_bert_classifier(layers=4)} | MASKED
TASKS = {"bert": "sequence_classification"} | dict.fromkeys(MASKED, "masked_lm")


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_rows().input_ids).logits


def numbers(module):
    own = {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
    return {name: value for name, value in own.items() if name != "layer_idx"}


def test_even_is_distilberts_choice():
    assert choose_layers(12, 6, "even") == (0, 2, 4, 7, 9, 11)
    assert choose_layers(12, 6, "every_other") == (0, 2, 4, 6, 8, 10)
    assert choose_layers(12, 5, "first_last") == (0, 1, 2, 10, 11)
    assert choose_layers(30, 1, "even") == (0,)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 80), st.data(), st.sampled_from(["even", "every_other", "first_last"]))
def test_chosen_layers_exist_and_ascend(total, data, rule):
    count = data.draw(st.integers(1, total))
    layers = choose_layers(total, count, rule)
    assert len(layers) == count
    assert list(layers) == sorted(set(layers))
    assert layers[0] == 0
    assert layers[-1] < total
    if rule != "every_other" and count > 1:
        assert layers[-1] == total - 1


@pytest.mark.parametrize("kind", MODELS)
def test_student_with_all_layers_is_the_teacher(kind):
    teacher = MODELS[kind]()
    student = initialise_student(teacher, (0, 1, 2, 3))
    assert torch.equal(logits(student), logits(teacher))
    shared = {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in student.parameters()
    }
    assert not shared


@pytest.mark.parametrize("kind", MODELS)
def test_a_student_that_is_read_from_disk_is_the_one_that_is_copied(kind, tmp_path):
    teacher = MODELS[kind]()
    teacher.save_pretrained(tmp_path)
    model, blocks = open_streamed(tmp_path, task=TASKS.get(kind, "causal_lm"))
    name = find_blocks(model)[0]
    left_out = model.get_submodule(f"{name}.1")
    student, copied = load_student(model, blocks, (0, 3)), initialise_student(teacher, (0, 3))
    assert all(each.is_meta for each in left_out.parameters())
    ours, expected = student.state_dict(), copied.state_dict()
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert all(each.requires_grad for each in student.parameters())
    assert torch.equal(logits(student), logits(copied))
    assert student.config.to_dict() | {"_name_or_path": ""} == copied.config.to_dict() | {
        "_name_or_path": ""
    }


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_student_keeps_the_head_and_its_tie(kind, tmp_path):
    teacher = MASKED[kind]()
    student = initialise_student(teacher, (1, 3))
    assert type(student) is type(teacher)
    head, words = student.get_output_embeddings(), student.get_input_embeddings()
    assert head.weight is words.weight
    of_head = {
        name: value
        for name, value in teacher.state_dict().items()
        if not name.startswith(f"{teacher.base_model_prefix}.")
    }
    assert len(of_head) > 3
    ours = student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in of_head.items())
    save_model(student, tiny_masked_tokenizer(), tmp_path)
    loaded = load_model(tmp_path, task="masked_lm")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(student))


@pytest.mark.parametrize(
    ("teacher", "layers"),
    [
        # Every second layer is sparse; the config counts from the student's first.
        (lambda: tiny_qwen3_moe(decoder_sparse_step=2), (0, 2)),
        # Of an encoder and a decoder only one is cut.
        (tiny_switch, (0, 1)),
    ],
    ids=["alternating", "two stacks"],
)
def test_a_student_that_would_load_as_another_model_is_refused(teacher, layers):
    with pytest.raises(RecipeError, match=r"would load as another model, .* differs"):
        initialise_student(teacher(), layers)


def test_layers_that_alternate_as_the_teachers_make_a_student(tmp_path):
    student = initialise_student(tiny_qwen3_moe(decoder_sparse_step=2), (2, 3))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize("kind", MODELS)
def test_student_has_the_chosen_blocks_and_reloads_as_itself(kind, tmp_path):
    teacher = MODELS[kind]()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = initialise_student(teacher, (0, 2))
    theirs, ours = find_blocks(teacher)[1], find_blocks(student)[1]
    assert len(ours) == student.config.num_hidden_layers == 2
    assert len(theirs) == teacher.config.num_hidden_layers == 4
    for block, source in zip(ours, (theirs[0], theirs[2]), strict=True):
        for name, value in block.state_dict().items():
            assert torch.equal(value, source.state_dict()[name])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    student.save_pretrained(tmp_path)
    reloaded = type(student).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(student))


@pytest.mark.parametrize("read_from_disk", [False, True], ids=["copied", "read"])
@pytest.mark.parametrize("kind", NUMBERED)
def test_what_is_computed_from_a_layers_number_follows_the_new_one(kind, read_from_disk, tmp_path):
    teacher = NUMBERED[kind]()
    if read_from_disk:
        teacher.save_pretrained(tmp_path / "teacher")
        student = load_student(*open_streamed(tmp_path / "teacher", task="causal_lm"), (0, 3))
    else:
        student = initialise_student(teacher, (0, 3))
    student.save_pretrained(tmp_path / "student")
    reloaded = type(student).from_pretrained(tmp_path / "student").eval()
    assert torch.equal(logits(student), logits(reloaded))


@pytest.mark.parametrize("kind", ["scaled gpt2", "gpt neo"])
def test_a_narrower_student_of_fewer_layers_reloads_as_itself(kind, tmp_path):
    student = initialise_student(NUMBERED[kind](), (0, 3))
    narrow = narrow_student(student, Width(intermediate_size=24), token_rows(4))
    narrow.save_pretrained(tmp_path)
    assert torch.equal(logits(narrow), logits(type(narrow).from_pretrained(tmp_path).eval()))


@pytest.mark.parametrize("kind", ["llama", "bert", "masked distilbert"])
def test_blocks_that_do_not_know_their_number_keep_all_they_hold(kind):
    teacher = MODELS[kind]()
    student = initialise_student(teacher, (0, 3))
    pairs = zip(find_blocks(student)[1], (find_blocks(teacher)[1][i] for i in (0, 3)), strict=True)
    for block, source in pairs:
        for ours, theirs in zip(block.modules(), source.modules(), strict=True):
            assert numbers(ours) == numbers(theirs)


def test_lists_with_an_entry_a_layer_follow_the_choice():
    teacher = tiny_qwen2()
    student = initialise_student(teacher, (1, 2))
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert student.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("kind", DECODERS)
def test_decoding_with_the_cache_equals_decoding_without(kind):
    student = initialise_student(DECODERS[kind](), (1, 3))
    prompt = token_rows(1, 6).input_ids
    made = [
        student.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    for one, other in zip(made[0].logits, made[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied():
    student = initialise_student(tiny_llama(layers=3), (0, 2))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_frozen_teacher_gives_a_student_that_learns():
    student = initialise_student(tiny_llama().requires_grad_(False), (0,))
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 4), (-1, 0)])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(RecipeError, match=r"student\.layers"):
        initialise_student(tiny_llama(layers=4), layers)


@pytest.mark.parametrize("count", [0, 5])
def test_impossible_counts_are_refused(count):
    with pytest.raises(RecipeError, match="expected 1 to 4 layers"):
        choose_layers(4, count)


def test_saved_student_loads_through_the_auto_class(tmp_path):
    initialise_student(tiny_gpt2(), (0, 3)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.n_layer == 2
