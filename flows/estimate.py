"""How long a stage will take and how much memory it will need, from the model's shape alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flows.shape import Shape
from stillroom.config import Adapter, Data, Recipe
from stillroom.hardware import threads_here
from tasks.stages import Order

# From the seconds in the manifests of `make demo` on two x86-64 cores, 2026-11-24: 70e9 in the
# teacher cache, 63e9 in the distillation, both in fp32.
FLOPS_A_THREAD = 65e9
START_SECONDS = 6.0
# What a process holds once it has imported torch and transformers, with some room; builds of
# torch with CUDA in them hold more (0.54 GB instead of 0.25, by VmHWM).
PROCESS_BYTES = 0.6e9
CUDA_BUILD_BYTES = 0.3e9
TEXT_TOKENS = 1_000_000
PASSES = {"forward": 2, "train": 6, "train_adapter": 5}
# Quantization: through the originals, through the quantized blocks, and parts of that again.
QUANTIZING_PASSES = 3.2
# Products of a layer's weight with a square matrix of its inputs: solving, choosing, refining.
SOLVER_PRODUCTS = 17
QUANTIZED_ROWS = 4
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Estimate:
    """Seconds on this machine's processors, and the most bytes of memory at a time."""

    seconds: float
    memory_bytes: float


def estimate(order: Order, recipe: Recipe, teacher: Shape | None) -> Estimate:
    """Return what one stage will need; zeros where the teacher's shape is not known."""
    if teacher is None:
        return Estimate(0.0, 0.0)
    student = teacher.of_student(recipe.distillation.student) if recipe.distillation else teacher
    data = _data_of(order, recipe)
    rows = data.sequence_length * recipe.evaluation.batch_rows
    train = data.max_train_tokens or TEXT_TOKENS
    measured = data.max_evaluation_tokens or TEXT_TOKENS // 10
    match order.stage.name:
        case "import_model" | "trim_vocabulary":
            need = _need(0, 2 * teacher.parameters, 0)
        case "prepare_data":
            need = _need(0, 0, 0)
        case "cache_teacher":
            asked = measured if order.section.get("rows") == "evaluation" else train
            flops = PASSES["forward"] * asked * teacher.active_parameters
            logits = rows * teacher.vocabulary
            workers = recipe.execution.cache_workers
            need = _need(flops, teacher.parameters, logits, processes=workers)
        case "tune_teacher" | "distill_student":
            model = teacher if order.stage.name == "tune_teacher" else student
            tokens = _trained_tokens(order.section["training"], train, data)
            flops = PASSES["train"] * tokens * model.active_parameters
            need = _training(order, flops, 4 * model.parameters, 3 * rows * model.vocabulary)
        case "quantize_model" | "merge_adapter":
            need = _quantizing(order, student, data)
        case "run_trial":
            trial = order.section["trial"]
            tokens = _trained_tokens(order.section["training"], train, data)
            # Signs, permutation and scales of the projection, what it gives and its gradient; or
            # the gradient and the optimizer's moments.
            held = (7 if trial["dimension"] else 4) * teacher.parameters
            need = _need(PASSES["train"] * tokens * teacher.active_parameters, held, 3 * rows)
        case "fit_dimension":
            need = _need(0, 0, 0)
        case "train_adapter":
            tokens = _trained_tokens(order.section["training"], train, data)
            flops = PASSES["train_adapter"] * tokens * student.active_parameters
            need = _training(order, flops, student.parameters, 3 * rows * student.vocabulary)
        case _:
            both = teacher.parameters + student.parameters
            active = teacher.active_parameters + student.active_parameters
            need = _need(PASSES["forward"] * measured * active, both, 2 * rows * teacher.vocabulary)
    return need


def _trained_tokens(training: Mapping[str, Any], train: float, data: Data) -> float:
    """Return how many tokens a training goes through: those of its steps, or of its epochs."""
    if not training["steps"]:
        return train * float(training["epochs"])
    rows_a_step = training["batch_rows"] * training["gradient_accumulation"]
    return float(training["steps"] * rows_a_step * data.sequence_length)


def _need(flops: float, parameters: float, activations: float, *, processes: int = 1) -> Estimate:
    """Return the need of a stage whose processes, together as fast as one, each hold so much."""
    seconds = START_SECONDS + flops / (FLOPS_A_THREAD * threads_here())
    build = 0 if version("torch").endswith("+cpu") else CUDA_BUILD_BYTES
    each = PROCESS_BYTES + build + 4 * (parameters + activations)
    return Estimate(seconds, processes * each)


def _training(order: Order, flops: float, parameters: float, activations: float) -> Estimate:
    """Return the need of a training; sharing parameters out saves nothing at its two ends."""
    processes: int = order.unkeyed.get("processes", 1)
    return _need(flops, parameters, activations, processes=processes)


def _quantizing(order: Order, model: Shape, data: Data) -> Estimate:
    """Return what quantization needs: embeddings, one block, its solver and a batch of rows.

    `tests/flows/test_quantize_memory.py` holds a run to it.
    """
    tokens = data.calibration_rows * data.sequence_length
    passes = QUANTIZING_PASSES * PASSES["forward"] * tokens * model.block_parameters
    # Inputs of the four kinds of layers: three of them `hidden` wide, one `inner`.
    squares = 3 * model.hidden**2 + model.inner**2
    solving = SOLVER_PRODUCTS * 2 * model.block_parameters * (3 * model.hidden + model.inner) / 4
    flops = model.layers * (passes + 3 * tokens * squares + solving)
    section = order.section
    if section["mixed"]:
        flops += _measuring_choices(section["mixed"], model, data)
    whole = order.stage.name == "merge_adapter"
    if whole or section["engine"] == "gptqmodel" or section["mixed"]:
        return _need(flops, 2 * model.parameters, 2 * tokens * model.hidden)
    batch = QUANTIZED_ROWS * data.sequence_length
    stacked = 2 * model.hidden * model.inner  # the largest layers that share an input
    parameters = model.embedding_parameters + 2 * model.block_parameters + 8 * stacked
    activations = 20 * max(model.hidden, model.inner) ** 2 + 8 * batch * model.inner
    return _need(flops, parameters, activations + 3 * min(batch * model.vocabulary, LOGITS_AT_ONCE))


def _measuring_choices(mixed: Mapping[str, Any], model: Shape, data: Data) -> float:
    """Return the operations of measuring what each choice of mixed bits costs.

    The layers with the same input are measured together: four kinds in a block, two of them once
    for each expert. On average half of the blocks lie behind the one that is changed. The tokens
    are spread over the rows, and rows run whole.
    """
    groups = model.layers * (2 + 2 * model.experts)
    choices = len(mixed["bits"]) * max(1, len(mixed["group_sizes"]))
    rows: int = min(data.calibration_rows, mixed["measured_tokens"])
    tokens = rows * data.sequence_length
    behind = (model.active_parameters - model.embedding_parameters) / 2
    return groups * choices * PASSES["forward"] * tokens * behind


def _data_of(order: Order, recipe: Recipe) -> Data:
    adapter: Adapter
    for adapter in recipe.adapters:
        own = ("prepare data", "train adapter", "merge adapter")
        titles = [f"{part} {adapter.name}" for part in own]
        if order.title in titles or order.title.endswith(f" on {adapter.name}"):
            return adapter.data
    return recipe.data
