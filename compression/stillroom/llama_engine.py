"""Run a GGUF file under llama.cpp, where the package llama-cpp-python is installed."""

import importlib.util
import json
import threading
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.errors import CorruptedError, SourceError
from stillroom.hardware import threads_here

GGUF_FILE = "model.gguf"  # in a model's folder, beside its safetensors
SMALLEST_CONTEXT = 512  # tokens
FURTHER_RULES = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
}
"""Settings of transformers that change a greedy choice, and what they are where they do not."""


def has_llama_cpp() -> bool:
    """Return whether llama.cpp can be imported here."""
    return importlib.util.find_spec("llama_cpp") is not None


def read_stop_ids(folder: Path) -> frozenset[int]:
    """Return the tokens that end a text, as `generate` of transformers reads them."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def read_further_rules(folder: Path) -> list[str]:
    """Return what generation_config.json sets that chooses others than the likeliest tokens."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    return [name for name, none in FURTHER_RULES.items() if settings.get(name) not in (None, none)]


class LlamaCppModel:
    """A causal LM in a GGUF file. It takes and gives token ids: text is the tokenizer's part.

    Several Python threads may call it at once, as MLflow's server does: one text comes after the
    other, because llama.cpp keeps what was read so far in one place.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        """Open the file, with as many threads as there are cores unless `threads` says how many.

        Raises:
            SourceError: llama-cpp-python is not installed.
            CorruptedError: llama.cpp cannot load the file.
        """
        if not has_llama_cpp():
            raise SourceError(
                "llama.cpp is not installed: run `make install-llama-cpp`, or "
                "pip install llama-cpp-python, which compiles it"
            )
        self.file = file
        self.threads = threads or threads_here()
        self._close: Any = None
        self._one_at_a_time = threading.Lock()
        self._open(SMALLEST_CONTEXT, every=False)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, (tokens, vocab)."""
        with self._one_at_a_time:
            self._begin(len(ids), every=True)
            self._llama.eval(list(ids))
            return np.array(self._llama.scores[: len(ids)])

    def continue_greedily(
        self, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[int]:
        """Return the most likely token again and again, until one of `stop_ids`, which is left out.

        Args:
            ids: the prompt, at least one token.
            max_new_tokens: most tokens to add.
            stop_ids: tokens that end the text.
        """
        fresh: list[int] = []
        step = list(ids)
        with self._one_at_a_time:
            self._begin(len(ids) + max_new_tokens, every=False)
            for _ in range(max_new_tokens):
                self._llama.eval(step)
                best = int(self._last_logits().argmax())
                if best in stop_ids:
                    break
                fresh.append(best)
                step = [best]
        return fresh

    def _last_logits(self) -> NDArray[np.float32]:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),))

    def _begin(self, tokens: int, *, every: bool) -> None:
        """Forget the text so far, and make room for `tokens`; `every`: keep all their logits."""
        if tokens > self._llama.n_ctx() or every != self._every:
            # Doubled, so that texts that grow slowly do not open the file each time.
            context = max(SMALLEST_CONTEXT, self._llama.n_ctx())
            while context < tokens:
                context *= 2
            self._open(context, every=every)
        self._llama.reset()

    def _open(self, context: int, *, every: bool) -> None:
        import llama_cpp

        if self._close is not None:
            self._close()
        try:
            self._llama: Any = llama_cpp.Llama(
                str(self.file),
                n_ctx=context,
                n_threads=self.threads,
                n_threads_batch=self.threads,
                logits_all=every,
                verbose=False,
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            raise CorruptedError(
                f"llama.cpp cannot load {self.file} ({error}); export it again, with a "
                f"llama-cpp-python that is as new"
            ) from error
        # At the interpreter's end too: its own clean-up comes too late there.
        self._close = weakref.finalize(self, self._llama.close)
        self._every = every
