"""The library on a CUDA device: the same work as on the CPU, to the rounding of the sums."""

import copy
from dataclasses import replace

import pytest
import torch

from stillroom.adapters.adapted_model import AdaptedModel
from stillroom.adapters.folder import load_into, save_adapter
from stillroom.adapters.training import train_adapter
from stillroom.checkpoint import FolderCheckpoints
from stillroom.distillation.distill import DistillationOptions, Taught, distill
from stillroom.distillation.student import initialise_student
from stillroom.distillation.teacher_cache import CacheOptions, capture
from stillroom.evaluation.quality import measure_quality
from stillroom.quantization.formats.export import check_folder, save_quantized
from stillroom.quantization.formats.loading import load_quantized
from stillroom.quantization.kernels.report import packed_layers, report_kernels
from stillroom.quantization.options import QuantizationOptions
from stillroom.quantization.sequential import quantize_model
from stillroom.training.options import TrainingOptions
from tests.stillroom.adapters.test_adapted_model import OPTIONS as ADAPTERS
from tests.stillroom.adapters.zoo import build
from tests.stillroom.quantization.test_sequential import MODELS, rows
from tests.stillroom.quantization.test_sequential import logits as cpu_logits
from tests.stillroom.rows import TOKENIZER, token_rows
from tests.stillroom.tiny import tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAINING = TrainingOptions(
    steps=12, batch_rows=4, learning_rate=5e-3, checkpoint_every_steps=4, evaluate_every_steps=6
)
OPTIONS = DistillationOptions(TRAINING, soft_weight=1.0, hard_weight=0.0, temperature=1.0)


@torch.no_grad()
def logits(model, data):
    device = next(model.parameters()).device
    ids, mask = data.input_ids.to(device), data.attention_mask.to(device)
    return model(input_ids=ids, attention_mask=mask).logits.cpu()


def without_dropout(model):
    """Return the model, whose draws would differ from device to device."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "options", [QuantizationOptions(4, 32, True, true_sequential=each) for each in (True, False)]
)
def test_quantization_loses_what_it_loses_on_the_cpu(kind, options):
    data, make = rows(count=12), MODELS[kind]
    reference = cpu_logits(make(), data)
    here, there = make(), make().cuda()
    quantize_model(here, data, options)
    result = quantize_model(there, data, options)
    assert result.fallbacks == 0
    lost = [float((logits(model, data) - reference).square().sum()) for model in (here, there)]
    assert lost[1] < 1.3 * lost[0]  # a choice may turn out otherwise
    nearest = make().cuda()
    quantize_model(nearest, data, replace(options, method="rtn"))
    assert lost[1] < float((logits(nearest, data) - reference).square().sum())


def test_every_method_runs_there():
    data = rows(count=12)
    for changes in ({"method": "obq"}, {"embedding_bits": 8}, {"matmul_precision": "highest"}):
        model = tiny_llama().cuda()
        result = quantize_model(model, data, replace(QuantizationOptions(4, 32), **changes))
        assert result.fallbacks == 0
        assert torch.isfinite(logits(model, data)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_packed_model_computes_there(tmp_path, bits, dtype):
    data, model = rows(), tiny_llama(hidden=64).cuda()
    result = quantize_model(model, data, QuantizationOptions(bits, 32))
    save_quantized(model, tiny_tokenizer(), result, tmp_path)
    assert check_folder(tmp_path, result, "causal_lm", "cuda").relative < 1e-4
    packed = load_quantized(tmp_path, dtype=dtype, weights="packed").cuda()
    report = report_kernels(packed, data.input_ids.cuda())
    assert report.layers == {f"triton-int{bits}": len(packed_layers(packed))}
    assert report.logit_difference < {torch.float32: 1e-5}.get(dtype, 0.05)
    with torch.no_grad():
        one = packed(input_ids=data.input_ids[:1, :1].cuda()).logits.cpu()
        expected = model(input_ids=data.input_ids[:1, :1].cuda()).logits.cpu()
    assert (one - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_compiled_packed_model_computes_the_same(tmp_path):
    model = tiny_llama(hidden=64)
    result = quantize_model(model, rows(), QuantizationOptions(4, 32))
    save_quantized(model, tiny_tokenizer(), result, tmp_path)
    packed = load_quantized(tmp_path, dtype=torch.float16, weights="packed").cuda()
    graph = torch.compile(packed, backend="aot_eager")
    with torch.no_grad():
        ids = rows().input_ids[:1].cuda()
        assert torch.equal(graph(input_ids=ids).logits, packed(input_ids=ids).logits)


def test_a_teachers_outputs_are_those_of_the_cpu(tmp_path):
    teacher, examples = tiny_llama(layers=3), token_rows(8, padding=3)
    folders = []
    for model in (teacher, copy.deepcopy(teacher).cuda()):
        folder = tmp_path / next(model.parameters()).device.type
        options = CacheOptions(kind="dense", rows_per_shard=4)
        folders.append(capture(model, examples, folder, options, tokenizer_hash=TOKENIZER))
    chosen = torch.arange(8)
    here, there = (cache.targets(chosen).logits.float() for cache in folders)
    assert torch.allclose(here, there, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_student_learns_there_as_on_the_cpu(tmp_path, dtype, recomputed):
    teacher, examples, fresh = tiny_llama(layers=3), token_rows(40), token_rows(8, seed=1)
    training = replace(TRAINING, dtype=dtype, gradient_checkpointing=recomputed)
    options = replace(OPTIONS, training=training)
    losses = {}
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(teacher).to(device)
        chosen = CacheOptions(rows_per_shard=4)
        cache = capture(here, examples, tmp_path / device, chosen, tokenizer_hash=TOKENIZER)
        student = initialise_student(here, (0,))
        history = distill(student, Taught(examples, cache), options, evaluation=Taught(fresh))
        losses[device] = history.loss
    bound = 2e-3 if dtype == "float32" else 5e-2
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=bound)
    assert losses["cuda"][-1] < losses["cuda"][0]


def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total, unit, note=""):
        if done == 7:
            raise Stopped

    teacher, examples = tiny_llama(layers=3).cuda(), token_rows(40)
    chosen = CacheOptions(rows_per_shard=4)
    cache = capture(teacher, examples, tmp_path / "cache", chosen, tokenizer_hash=TOKENIZER)
    whole, killed, resumed = (initialise_student(teacher, (0,)) for _ in range(3))
    distill(whole, Taught(examples, cache), OPTIONS)
    checkpoints = FolderCheckpoints(tmp_path / "kept")
    with pytest.raises(Stopped):
        distill(killed, Taught(examples, cache), OPTIONS, checkpoints=checkpoints, progress=stop)
    distill(resumed, Taught(examples, cache), OPTIONS, checkpoints=checkpoints)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_learns_there_as_on_the_cpu(tmp_path, method, bits):
    def base(device):
        # Of GPT-2 every method can do something.
        return AdaptedModel(without_dropout(build("gpt2", bits)).to(device))

    examples, losses = token_rows(16), {}
    for device in ("cpu", "cuda"):
        adapted = base(device)
        adapted.add("a", ADAPTERS[method])
        losses[device] = train_adapter(adapted, "a", examples, TRAINING).loss
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)
    assert losses["cuda"][-1] < losses["cuda"][0]
    save_adapter(adapted, "a", tmp_path / "saved", "base")
    here = base("cpu")
    load_into(here, "a", tmp_path / "saved")
    expected = logits(adapted.eval(), examples)
    assert (logits(here.eval(), examples) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_quality_is_that_of_the_cpu():
    teacher, model, examples = tiny_llama(seed=1), tiny_llama(), token_rows(8, padding=3)
    here = measure_quality(model, teacher, examples)
    there = measure_quality(model.cuda(), teacher.cuda(), examples)
    assert there.nats == pytest.approx(here.nats, rel=1e-4)
    assert there.kl_nats == pytest.approx(here.kl_nats, rel=1e-3)
    assert there.correct == here.correct
