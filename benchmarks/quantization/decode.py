"""Decoding on this CPU: the GGUF export under llama.cpp and the packed linear, against fp32."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.claims import Claim, at_least, at_most
from benchmarks.quantization.cells import MAIN, Cell
from benchmarks.quantization.measures import keep
from benchmarks.quantization.places import bench_folder
from benchmarks.quantization.rows import run_job
from benchmarks.quantization.work import BLOCKS, calibration_rows, model_folder

NEW_TOKENS = 64
PROMPT = 16  # tokens
REPEATS = 5
DECODED = (1, 2, 4, 8)  # tokens at once


def measure_decode() -> None:
    """Time both, interleaved, and keep what could be measured here."""
    from stillroom.llama_engine import has_llama_cpp

    claims, more = _linear()
    if has_llama_cpp():
        speeds = _tokens_per_second()
        slow = median(speeds["transformers fp32"])
        for way in ("GGUF export under llama.cpp", "the model behind the registered pyfunc"):
            text = f"{way}: tokens/s over those of fp32 transformers"
            claims.append(at_least(text, 6.0, median(speeds[way]) / slow))
        more["tokens_per_second"] = speeds
    keep("decode", claims, **more)


def _linear() -> tuple[list[Claim], dict[str, Any]]:
    """Compare our packed linear with fp32 at SmolLM2's shapes, each from memory as in decode."""
    from dataclasses import asdict

    from benchmarks.quantization.kernels import SHAPES, compare

    ours = tuple(shape for shape in SHAPES if max(shape) <= 1536)
    threads = (torch.get_num_threads(),)
    rows = list(compare(ours, (4, 3), DECODED, threads, REPEATS, time.perf_counter))
    worst = max(row.ratio for row in rows if row.state == "cold")
    text = "our linear's time over fp32's in decode, the slowest of SmolLM2's shapes, 1 to 8 tokens"
    return [at_most(text, 1.0, worst)], {"linear": [asdict(row) for row in rows]}


def _tokens_per_second() -> dict[str, list[float]]:
    """Return the speeds of each way, in turn; each says how many tokens it made."""
    from stillroom.contents import Contents
    from stillroom.llama_engine import LlamaCppModel
    from stillroom.models import load_model
    from stillroom.serving import ServedModel

    file = _gguf()
    gguf = LlamaCppModel(file)
    dense = load_model(model_folder(), dtype=torch.float32)
    served = ServedModel(file.parent, Contents("base", "causal_lm", "", "", ()), {})
    prompt = calibration_rows(0).input_ids[0, :PROMPT]
    text = served.tokenizer.decode(prompt)

    def transformers() -> int:
        dense.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return NEW_TOKENS

    def pyfunc() -> int:
        made = served.predict([text], max_new_tokens=NEW_TOKENS)["generated"][0]
        return len(served.tokenizer(made)["input_ids"])

    ways: dict[str, Callable[[], int]] = {
        "transformers fp32": transformers,
        "GGUF export under llama.cpp": lambda: len(
            gguf.continue_greedily(prompt.tolist(), NEW_TOKENS, ())
        ),
        "the model behind the registered pyfunc": pyfunc,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            made = way()
            if repeat:  # the first warms up
                speeds[name].append(made / (time.perf_counter() - started))
    return speeds


def _gguf() -> Path:
    """Return the GGUF export of all 30 blocks at 4 bits; what they round to changes no time."""
    from stillroom.quantization.formats.gguf_export import export_gguf

    folder = bench_folder() / "running" / "decode"
    file = folder / "out.packed" / "model.gguf"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run_job(Cell("stillroom", "rtn", *MAIN[0], BLOCKS, repeat=0), folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(model_folder() / name, folder / "out.packed" / name)
        export_gguf(folder / "out.packed", file)
    return file
