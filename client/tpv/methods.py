"""The job methods: their options with defaults and sources, and what each one gives.

Torch-free, so that the service can validate a job and a form can be drawn from it. The code that runs a method is
``tpv_worker/methods/<name with underscores>.py``; a test proves that the worker implements exactly what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Options(BaseModel):
    """Options of a method: unknown names are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InitializeOptions(Options):
    """Draws P_init from the base model's input embeddings (DTVG paper, C.8: the 5000 most common words)."""

    strategy: Literal["random-vocab", "random-uniform", "text"] = "random-vocab"
    num_virtual_tokens: int = Field(100, ge=1, le=4096, description="Rows r of the soft prompt.")
    top_k: int = Field(5000, ge=1, description="random-vocab: draw among the non-special token ids below this.")
    range: float = Field(0.5, gt=0, description="random-uniform: values lie in [-range, range) (Lester 2021).")
    text: str | None = Field(None, description="text: its tokens, repeated or cut to num_virtual_tokens rows.")

    @model_validator(mode="after")
    def _text(self) -> Self:
        if (self.strategy == "text") != bool(self.text):
            raise ValueError("the strategy `text` needs a text, and only that one takes it")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingOptions(Options):
    """What every tuned soft prompt needs; the defaults are the few-shot setting of the DTVG paper (C.2, C.3, C.7)."""

    steps: int = Field(1000, ge=1, description="Optimizer steps at most.")
    batch_size: int = Field(32, ge=1, description="Rows a step.")
    learning_rate: float = Field(0.3, gt=0, description="Rate of the prompt's own parameters (C.7).")
    weight_decay: float = Field(1e-5, ge=0, description="AdamW weight decay (C.2).")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    schedule: Literal["constant", "linear"] = Field("linear", description="Learning rate after the warm-up (C.2).")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    clip_norm: float | None = Field(None, gt=0, description="Gradient norm is clipped to this; none: not at all.")
    evaluate_every: int = Field(50, ge=1, description="Steps between two validations (C.3); the best one is kept.")
    evaluate_rows: int | None = Field(None, ge=1, description="First rows of validation used to pick the best step.")
    stop_below: float | None = Field(None, ge=0, description="Stop when the running training loss is below this.")
    max_source_tokens: int = Field(256, ge=1, description="Tokens of the source that are kept (C).")
    max_target_tokens: int = Field(16, ge=1, description="Tokens a target may have; a longer one is an error.")
    separator: str = Field("\n", description="Decoder-only models: the text between source and target.")


class PromptTuningOptions(TrainingOptions):
    """Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning."""


class DtvgOptions(TrainingOptions):
    """Zhang et al. 2025, Dynamic Task Vector Grouping for Efficient Multi-Task Prompt Tuning."""

    source_scale_learning_rate: float = Field(0.4, gt=0, description="Rate of the sources' scaling terms (C.7).")
    target_scale_learning_rate: float | None = Field(
        None, gt=0, description="Rate of the target's scaling term; none: learning_rate, as in C.7."
    )
    strategy: Literal["greedy"] = Field("greedy", description="Grouping strategy (Algorithm 2).")
    regroup_every: int = Field(1, ge=1, description="Steps between two groupings; the paper groups at every step.")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the list: what a job of this method takes and gives."""

    name: str
    options: type[Options]
    result: Literal["initialization", "vector"]
    transfers: bool = False  #: needs a target vector and source vectors


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(name="initialize", options=InitializeOptions, result="initialization"),
        Method(name="prompt-tuning", options=PromptTuningOptions, result="vector"),
        Method(name="dtvg", options=DtvgOptions, result="vector", transfers=True),
    )
}


def options_of(method: str, values: Mapping[str, Any]) -> Options:
    """The validated options of a method; raises KeyError for an unknown method, pydantic.ValidationError for values."""
    return METHODS[method].options.model_validate(values)
