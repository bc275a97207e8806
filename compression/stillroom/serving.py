"""What MLflow loads and asks: a registered base or adapter behind `predict`.

The registered version carries this package along, and nothing of it is pickled: its code file
calls `as_pyfunc`, and the model is read from safetensors. Where the version holds a GGUF export
and llama.cpp is installed, that decodes instead of torch; the tokenizer is the same.
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillroom.contents import Contents, read_contents
from stillroom.errors import MismatchError
from stillroom.intrinsic_dimension.folders import is_subspace
from stillroom.llama_engine import GGUF_FILE, LlamaCppModel, read_stop_ids
from stillroom.remote_code import trusting_code
from stillroom.serving_options import DEFAULT_CONFIG, choose_engine, trusts_code

# The code file of every registered version.
CODE = """\
from mlflow.models import set_model
from stillroom.serving import as_pyfunc

set_model(as_pyfunc())
"""
DEFAULT_NEW_TOKENS = 32
READ_AT_ONCE = 16
MASK = "[MASK]"
"""What stands for a hidden word in every text, whatever the tokenizer's own mask is."""


def as_pyfunc() -> Any:
    """Return what MLflow takes for a model: it loads a `ServedModel` and passes questions on.

    `model_config` of `mlflow.pyfunc.load_model` may set `weights` (of a quantized model: "packed"
    keeps its integers in memory, "dense" unpacks them once, "auto" takes what decodes faster on the
    device), `dtype` and `device`, `engine`: "auto" takes "llama.cpp" where the version holds a GGUF
    export that it can run and these leave it to it, else "torch", and `trust_remote_code`, for a
    version that brings Python code along, which you have read.
    """
    from pandas import DataFrame

    with warnings.catch_warnings():
        # MLflow warns of its own type hints on import.
        warnings.simplefilter("ignore", UserWarning)
        from mlflow.pyfunc.model import PythonModel

    class Pyfunc(PythonModel):
        def load_context(self, context: Any) -> None:
            contents = read_contents(Path(context.artifacts["contents"]))
            folder = Path(context.artifacts["model"])
            self.served = ServedModel(folder, contents, context.model_config or {})

        # Lists become tables on the way in. Of other hints than this one, MLflow would make a
        # signature of its own, without parameters.
        def predict(
            self, context: Any, model_input: DataFrame, params: dict[str, Any] | None = None
        ) -> Any:
            return self.served.predict(model_input, **(params or {}))

    return Pyfunc()


class ServedModel:
    """A causal LM that continues texts, a masked one that fills them, or a classifier of them."""

    def __init__(self, folder: Path, contents: Contents, config: Mapping[str, Any]) -> None:
        """Load the model from the version's files, and an adapter's base from the registry."""
        self.config = {**DEFAULT_CONFIG, **config}
        self.contents = contents
        self.engine = choose_engine(self.config, folder, contents)
        load = self._load if contents.base is None else self._load_adapted
        with trusting_code(trusts_code(self.config)):
            self.model, self.tokenizer = (
                self._load_gguf(folder) if self.engine == "llama.cpp" else load(folder)
            )

    def predict(self, model_input: Any, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> Any:
        """Return a table with a row for each text.

        Args:
            model_input: a table with the one column `text`, a list of texts, or one text.
            max_new_tokens: most tokens that a causal LM adds to each text. Of a text that is too
                long for the model's context it reads the end, so that they fit in it.

        Returns:
            For a causal LM the column `generated`, without the prompt; for a masked one `filled`,
            the text with each [MASK] replaced by the likeliest word, `words` and `scores` (those
            words and their probabilities, each alone); for a classifier `label`, `score` (its
            probability) and `scores` (every class's probability).

        Raises:
            MismatchError: no texts came, for a masked LM one without a mask that is read, or a
                causal LM's context does not hold as many new tokens.
        """
        texts = texts_of(model_input)
        match self.contents.task:
            case "causal_lm":
                return self._generate(texts, max_new_tokens)
            case "masked_lm":
                return self._fill(texts)
            case "sequence_classification":
                return self._classify(texts)

    def _load(self, folder: Path) -> tuple[Any, Any]:
        import torch

        from stillroom.labels import require_label_head
        from stillroom.models import load_model, load_tokenizer
        from stillroom.quantization.kernels.choose import fastest_weights

        if self.contents.base is None and self.contents.task == "sequence_classification":
            remedy = "load an adapter that was registered on it"
            require_label_head(folder, "this version", remedy)
        device, weights = self.config["device"], self.config["weights"]
        model = load_model(
            folder,
            task=self.contents.task,
            dtype=getattr(torch, self.config["dtype"]),
            weights=fastest_weights(device) if weights == "auto" else weights,
        )
        return model.to(device), load_tokenizer(folder)

    def _load_gguf(self, folder: Path) -> tuple[Any, Any]:
        from stillroom.models import load_config, load_tokenizer
        from stillroom.quantization.formats.gguf_architectures import find_architecture
        from stillroom.quantization.formats.gguf_hyperparameters import context_length

        self.stop_ids = read_stop_ids(folder)
        config = load_config(folder)
        self.context = None
        if getattr(config, "max_position_embeddings", None):
            self.context = context_length(find_architecture(config), config)
        return LlamaCppModel(folder / GGUF_FILE), load_tokenizer(folder)

    def _load_adapted(self, adapter: Path) -> tuple[Any, Any]:
        import torch

        from stillroom.adapters.folder import load_adapter
        from stillroom.intrinsic_dimension.artifact import load_with_base
        from stillroom.models import load_tokenizer
        from stillroom.pull import fetch_base, open_client

        assert self.contents.base is not None
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch) / "base"
            fetch_base(open_client(), self.contents.base, base)
            if is_subspace(adapter):
                dtype = getattr(torch, self.config["dtype"])
                moved = load_with_base(adapter, base, task=self.contents.task).merged()
                return moved.to(self.config["device"], dtype).eval(), load_tokenizer(base)
            model, tokenizer = self._load(base)
        return load_adapter(model, adapter).to(self.config["device"]).eval(), tokenizer

    def _generate(self, texts: list[str], max_new_tokens: int) -> Any:
        import pandas

        generated = []
        # One by one: padding changes the rounding, and a greedy choice may hang on it.
        for text in texts:
            ids = self.tokenizer(text)["input_ids"] or [self._start_id()]
            ids = self._cut(ids, max_new_tokens)
            if self.engine == "llama.cpp":
                fresh = self.model.continue_greedily(ids, max_new_tokens, self.stop_ids)
            else:
                fresh = self._continue_in_torch(ids, max_new_tokens)
            generated.append(self.tokenizer.decode(fresh, skip_special_tokens=True))
        return pandas.DataFrame({"generated": generated})

    def _cut(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """Return the last tokens of a prompt, as many as leave room for new ones.

        A token that begins every text stays. The last new token is never read.
        """
        if max_new_tokens < 1:
            raise MismatchError(f"expected max_new_tokens of 1 or more; {max_new_tokens} came")
        limit = self._context()
        if limit is None or len(ids) + max_new_tokens - 1 <= limit:
            return ids
        room = limit + 1 - max_new_tokens
        begun = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        if room <= len(begun):
            raise MismatchError(
                f"expected at most {limit - len(begun)} new tokens, {max_new_tokens} came: the "
                f"model reads {limit} tokens, the text included; set max_new_tokens lower"
            )
        return begun + ids[len(ids) - room + len(begun) :]

    def _context(self) -> int | None:
        """Return how many tokens of a row the causal LM was made for, None for any number."""
        if self.engine == "llama.cpp":
            return self.context
        from stillroom.adapters.adapted_model import text_limit

        return text_limit(self.model)

    def _continue_in_torch(self, ids: list[int], max_new_tokens: int) -> list[int]:
        import torch

        from stillroom.data.tokens import padding_id

        prompt = torch.tensor([ids], device=self.config["device"])  # (1, tokens)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=padding_id(self.tokenizer),
            )
        fresh: list[int] = output[0, len(ids) :].tolist()
        return fresh

    def _classify(self, texts: list[str]) -> Any:
        import pandas

        names = self.model.config.id2label
        rows = []
        for _, logits in self._read(texts):  # (texts, classes)
            for scores in logits.float().softmax(-1).tolist():
                best = max(range(len(scores)), key=scores.__getitem__)
                rows.append((names[best], scores[best], scores))
        return pandas.DataFrame(rows, columns=["label", "score", "scores"])

    def _fill(self, texts: list[str]) -> Any:
        import pandas

        own = self.tokenizer.mask_token
        texts = [text.replace(MASK, own) for text in texts]
        for text in texts:
            if own not in text:
                raise MismatchError(
                    f"expected a text with {MASK} for a word to name; {text!r} came"
                )
        rows: list[tuple[str, list[str], list[float]]] = []
        for ids, logits in self._read(texts):  # (texts, length), (texts, length, vocab)
            for row, scores in zip(ids, logits, strict=True):
                hidden = row == self.tokenizer.mask_token_id
                if int(hidden.sum()) < texts[len(rows)].count(own):
                    raise MismatchError(
                        f"expected every {MASK} among the first {len(row)} tokens, which is what "
                        f"the model reads; text {len(rows)} has one later; shorten it"
                    )
                best = scores[hidden].float().softmax(-1).max(-1)  # (masks,)
                words = [self.tokenizer.decode([word]).strip() for word in best.indices.tolist()]
                whole = row.masked_scatter(hidden, best.indices)
                filled = self.tokenizer.decode(whole, skip_special_tokens=True).strip()
                rows.append((filled, words, best.values.tolist()))
        return pandas.DataFrame(rows, columns=["filled", "words", "scores"])

    def _read(self, texts: list[str]) -> Iterator[tuple[Any, Any]]:
        """Yield token ids (texts, length) and the logits of some texts at a time, cut to fit."""
        import torch

        from stillroom.data.tokens import padding_id

        longest = self._longest()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = padding_id(self.tokenizer)
        for start in range(0, len(texts), READ_AT_ONCE):
            encoded = self.tokenizer(
                texts[start : start + READ_AT_ONCE],
                padding=True,
                truncation=longest is not None,
                max_length=longest,
                return_tensors="pt",
            ).to(self.config["device"])
            ids = encoded["input_ids"]
            with torch.inference_mode():
                output = self.model(input_ids=ids, attention_mask=encoded["attention_mask"])
            yield ids, output.logits

    def _longest(self) -> int | None:
        """Return the most tokens of a text that model and tokenizer allow, None for any number."""
        from stillroom.adapters.adapted_model import text_limit

        own, limit = self.tokenizer.model_max_length, text_limit(self.model)
        longest = int(own if limit is None else min(own, limit))
        # A tokenizer that has no limit says a number which it does not take as one.
        return longest if longest < sys.maxsize else None

    def _start_id(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise MismatchError("an empty text came, and the tokenizer has no token to begin with")


def texts_of(model_input: Any) -> list[str]:
    """Return the texts in a table, a list, or a single text.

    Raises:
        MismatchError: there are none, or they are no texts.
    """
    if isinstance(model_input, str):
        return [model_input]
    columns = list(getattr(model_input, "columns", []))
    if columns:
        texts = list(model_input["text" if "text" in columns else columns[0]])
    else:
        texts = list(model_input)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        came = f"{type(wrong[0]).__name__}" if wrong else "an empty table"
        raise MismatchError(f"expected a column `text` or a list of texts; {came} came")
    return texts
