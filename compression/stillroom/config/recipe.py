"""The recipe: one file that says what is made, from what, and when it is good enough."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config.adapters import Adapter
from stillroom.config.distillation import Distillation
from stillroom.config.quantization import Quantization
from stillroom.config.section import Identifier, Section
from stillroom.config.sections import (
    Data,
    Evaluation,
    Execution,
    Gates,
    Model,
    Publish,
)

BASE_TEXT = "base"
"""What tables and reports call the text of `data`, beside those of the adapters."""
Control = Literal["cross_entropy", "round_to_nearest"]


class Recipe(Section):
    """Make a small model from a large one."""

    name: Identifier
    """Name of the recipe, in lower case, digits and dashes; runs and experiments bear it."""
    task: Literal["causal_lm", "masked_lm", "sequence_classification"] = "causal_lm"
    """Continue text, name hidden words of a text, or sort texts into classes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random number follows from it."""
    teacher: Model
    """The model to make smaller."""
    data: Data
    """What it is made smaller on, and measured on."""
    distillation: Distillation | None = None
    """Train a student with fewer layers; absent: go on with the teacher itself."""
    quantization: Quantization | None = None
    """Store the weights in few bits; absent: leave them as they are."""
    adapters: tuple[Adapter, ...] = ()
    """Tasks and domains to learn on top of the result."""
    controls: tuple[Control, ...] = ()
    """What is made beside the result to judge it: cross_entropy trains the same student without the
    teacher for the same steps; round_to_nearest quantizes without GPTQ."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""
    gates: Gates = Gates()
    """What must hold before anything is published."""
    publish: Publish | None = None
    """Where the result is registered; absent: it is only measured."""
    execution: Execution = Execution()
    """On what the stages run."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError(f"adapters must have different names: {', '.join(names)} came")
        if BASE_TEXT in names:
            raise ValueError(
                f"adapters.{BASE_TEXT}: reports call the text of `data` so; give it another name"
            )
        for each in self.adapters:
            if each.method == "lora" and each.merge and f"{each.name}-merged" in names:
                raise ValueError(
                    f"adapters.{each.name}-merged: what {each.name} is merged into is registered "
                    "so; give it another name"
                )
        if "cross_entropy" in self.controls and self.distillation is None:
            raise ValueError("controls: cross_entropy needs a distillation section")
        if self.distillation and self.task != "sequence_classification":
            divergence, kind = self.distillation.divergence, self.distillation.cache.kind
            if divergence in ("reverse_kl", "jensen_shannon") and kind != "dense":
                raise ValueError(
                    f"distillation.divergence: {divergence} needs distillation.cache.kind: dense, "
                    f"{kind} came; drawn probabilities would bias it"
                )
        # A teacher that is tuned first becomes float32.
        halved = self.teacher.dtype == "float16" and not self.teacher.fine_tune
        if self.distillation and halved:
            raise ValueError(
                "teacher.dtype: a student is trained in its teacher's numbers, and float16 is too "
                "coarse for AdamW; set it to float32 or bfloat16"
            )
        if "round_to_nearest" in self.controls and self.quantization is None:
            raise ValueError("controls: round_to_nearest needs a quantization section")
        if self.teacher.fine_tune and self.task == "causal_lm":
            raise ValueError(
                "teacher.fine_tune trains a new head: task must be masked_lm or "
                "sequence_classification, causal_lm came"
            )
        return self

    @model_validator(mode="after")
    def _trusts_what_is_loaded(self) -> "Recipe":
        if not self.teacher.trust_remote_code:
            return self
        if self.quantization and self.quantization.engine != "stillroom":
            raise ValueError(
                f"quantization.engine: {self.quantization.engine} runs no code of the teacher's "
                "(teacher.trust_remote_code); leave the engine out"
            )
        if self.gates.max_champion_loss_nats is not None:
            raise ValueError(
                "gates.max_champion_loss_nats loads the champion, whose code may be another's than "
                "the teacher's (teacher.trust_remote_code); leave this gate out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> "Recipe":
        everywhere = {"data": self.data}
        everywhere |= {f"adapters.{each.name}.data": each.data for each in self.adapters}
        usual = Data.model_fields["masked_fraction"].default
        for name, data in everywhere.items():
            if data.masked_fraction != usual and self.task != "masked_lm":
                raise ValueError(
                    f"{name}.masked_fraction: {data.masked_fraction:g} of the words are hidden "
                    f"for the task masked_lm, {self.task} came; leave it out"
                )
        quantization = self.quantization
        if quantization and quantization.max_perplexity_ratio and self.task != "causal_lm":
            masked = self.task == "masked_lm"
            gate = "max_perplexity_ratio" if masked else "min_accuracy_ratio"
            raise ValueError(
                f"quantization.max_perplexity_ratio predicts each next token, which {self.task} "
                f"does not; set gates.{gate} instead"
            )
        return self

    @model_validator(mode="after")
    def _gates_can_be_judged(self) -> "Recipe":
        if self.gates.max_champion_loss_nats is not None and self.publish is None:
            raise ValueError(
                "gates.max_champion_loss_nats compares with what is registered under publish.name: "
                "add a publish section, or leave this gate out"
            )
        if self.gates.min_decode_tokens_per_second is not None and self.task != "causal_lm":
            raise ValueError(
                "gates.min_decode_tokens_per_second: expected the task causal_lm, which generates, "
                f"{self.task} came; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit_the_task(self) -> "Recipe":
        for each in self.adapters:
            after = each.method == "p_tuning" and any(place == -1 for place, _ in each.template)
            if after and self.task == "causal_lm":
                raise ValueError(
                    f"adapters.{each.name}.template: virtual tokens after the text (-1) change no "
                    "prediction of a causal language model; put them before it, at 0"
                )
            if each.method == "lora" and each.merge:
                require_mergeable(each.name, self.quantization)
        return self

    @model_validator(mode="after")
    def _batches_can_be_dealt_out(self) -> "Recipe":
        processes = self.execution.training_processes
        sections = {f"adapters.{each.name}.training": each.training for each in self.adapters}
        if self.distillation:
            sections["distillation.training"] = self.distillation.training
        if self.teacher.fine_tune:
            sections["teacher.fine_tune"] = self.teacher.fine_tune
        for name, training in sections.items():
            if training.gradient_accumulation % processes:
                raise ValueError(
                    f"{name}.gradient_accumulation: {training.gradient_accumulation} batches a "
                    f"step cannot be dealt out evenly to {processes} training_processes; take a "
                    f"multiple of {processes}, and fewer batch_rows for as many rows a step"
                )
        return self


def require_mergeable(name: str, quantization: Quantization | None) -> None:
    """Refuse to merge an adapter into a base that is not quantized as it would be again."""
    ours = quantization and quantization.engine == "stillroom" and not quantization.mixed
    if not ours:
        raise ValueError(
            f"adapters.{name}.merge: expected a quantization section with engine stillroom and "
            "without mixed; a dense base needs no merge: stillroom pull --merged makes one model"
        )
