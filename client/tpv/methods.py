"""The job methods: their options with defaults and sources, and what each one gives.

Torch-free, so that the service can validate a job and a form can be drawn from it. The code that runs a method is
``tpv_worker/methods/<name with underscores>.py``; a test proves that the worker implements exactly what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from tpv.grouping import Strategy


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
    """What every training needs; the defaults are the few-shot setting of the DTVG paper (C.2, C.3, C.7)."""

    steps: int = Field(1000, ge=1, description="Optimizer steps at most (C.3).")
    batch_size: int = Field(32, ge=1, description="Rows a step (C).")
    accumulation: int = Field(1, ge=1, description="Parts that a batch is computed in, one after the other (C).")
    learning_rate: float = Field(0.3, gt=0, description="Rate of the prompt's own parameters (C.7).")
    weight_decay: float = Field(1e-5, ge=0, description="AdamW weight decay (C.2).")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas (PyTorch's defaults).")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon (PyTorch's default).")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Learning rate after the warm-up: constant, or down to zero at the last step (C.2)."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up (C.2: 500 for whole data sets).")
    clip_norm: float | None = Field(None, gt=0, description="Gradient norm is clipped to this; none: not at all.")
    evaluate_every: int = Field(50, ge=1, description="Steps between two validations (C.3); the best one is kept.")
    evaluate_rows: int | None = Field(None, ge=1, description="First rows of validation used to pick the best step.")
    patience: int | None = Field(
        None, ge=1, description="Stop after so many validations without a better one; none: never."
    )
    stop_below: float | None = Field(None, ge=0, description="Stop when the running training loss is below this.")
    max_source_tokens: int = Field(256, ge=1, description="Tokens of the source that are kept (C).")
    max_target_tokens: int = Field(16, ge=1, description="Tokens a target may have, ours; more are an error.")
    separator: str = Field("\n", description="Decoder-only models: text between source and target; ours.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the frozen weights (`full`, which trains them, has float32); auto: bfloat16 where the device "
        "computes it natively, else float32.",
    )
    compile: bool = Field(False, description="Compile the model (torch.compile): a slow first step, faster later ones.")


class PromptTuningOptions(TrainingOptions):
    """Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning."""


class SpotOptions(TrainingOptions):
    """Vu et al. 2022, SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer."""

    metric: Literal["cosine-prompt", "cosine", "cosine-flat", "dot"] = Field(
        "cosine-prompt",
        description="How the most similar source is found: SPoT compares pooled soft prompts, Table 1 of the DTVG "
        "paper pooled vectors (`dot`).",
    )


class SpotMultitaskOptions(TrainingOptions):
    """Vu et al. 2022: one soft prompt, tuned on a mixture of tasks in proportion to their numbers of examples."""

    mixing_limit: int = Field(
        2**19, ge=1, description="A task counts as if it had at most so many rows (Raffel et al. 2020, 3.5.2)."
    )


class TpvSumOptions(TrainingOptions):
    """Belanec et al. 2024, Task Prompt Vectors: P_init + scale * the sum of the sources' vectors, then tuned."""

    steps: int = Field(1000, ge=0, description="Optimizer steps at most; 0: zero-shot.")
    scales: list[FiniteFloat] = Field(
        [1.0],
        min_length=1,
        max_length=100,
        description="Scales to choose from on the validation rows, the first one on ties; one: taken as it is.",
    )


class DtvgOptions(TrainingOptions):
    """Zhang et al. 2025, Dynamic Task Vector Grouping for Efficient Multi-Task Prompt Tuning."""

    source_scale_learning_rate: float = Field(0.4, gt=0, description="Rate of the sources' scaling terms (C.7).")
    target_scale_learning_rate: float | None = Field(
        None, gt=0, description="Rate of the target's scaling term; none: learning_rate, as in C.7."
    )
    strategy: Strategy = Field(
        "greedy", description="Grouping strategy: greedy is Algorithm 2, prefix what the authors' released code runs."
    )
    trade_off: FiniteFloat | None = Field(None, ge=0, description="exact: lambda of Eq. 5; none: 1.")
    max_size: int | None = Field(None, ge=1, description="Largest group; k of top-k.")
    min_similarity: FiniteFloat | None = Field(
        None, description="Least similarity of a source; none: the strategy's rule."
    )
    regroup_every: int = Field(1, ge=1, description="Steps between two groupings; the paper groups at every step.")
    grouping: Literal["dynamic", "fixed-group", "only-target"] = Field(
        "dynamic", description="The paper's ablations (4.3): the first group for good, or no sources at all."
    )
    center: bool = Field(
        False, description="Ours: the mean pooled vector of a reference pool is subtracted before Eq. 2."
    )

    @model_validator(mode="after")
    def _strategy(self) -> Self:
        if self.trade_off is not None and self.strategy != "exact":
            raise ValueError(f"trade_off belongs to the strategy exact; {self.strategy} takes none")
        if self.max_size is None and self.strategy == "top-k":
            raise ValueError("the strategy top-k needs max_size, its k")
        return self


class AttemptOptions(TrainingOptions):
    """Asai et al. 2022, ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts."""

    bottleneck: int = Field(100, ge=1, description="Width between the attention's two projections (released code).")
    temperature: float | None = Field(
        None, gt=0, description="Of the attention; none: the model's width times e (3.2), which suits T5."
    )
    attention_learning_rate: float | None = Field(
        None, gt=0, description="Of the attention; none: learning_rate, as in the released code for one task."
    )
    mixing_limit: int = Field(
        2**19, ge=1, description="Several tasks: one counts as if it had at most so many rows (Raffel et al. 2020)."
    )


class MptOptions(TrainingOptions):
    """Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning."""

    source_steps: int = Field(
        1000, ge=0, description="Steps on the sources' data, which make the shared prompt; the paper takes five epochs."
    )
    distillation: float = Field(0.9, ge=0, description="lambda of Eq. 5: weight of the distillation (4.1); 0: none.")
    task_learning_rate: float = Field(0.4, gt=0, description="Rate of the target's own u and v (4.1).")
    mixing_limit: int = Field(
        2**19, ge=1, description="A source counts as if it had at most so many rows (Raffel et al. 2020)."
    )


class DeptOptions(TrainingOptions):
    """Shi and Lipani 2024, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning."""

    prompt_tokens: int = Field(
        40, ge=1, description="Rows m of the short prompt, at most those of P_init (released code)."
    )
    rank: int = Field(
        45, ge=1, description="Of the update A B: with m = 40 as many parameters as r = 100 (released code)."
    )
    update_learning_rate: float = Field(
        5e-4, gt=0, description="Rate of A and B; 5e-4, 5e-3 and 0.3 are tried (released code)."
    )


class LoraOptions(TrainingOptions):
    """Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models; through the library PEFT."""

    learning_rate: float = Field(2e-4, gt=0, description="Rate of the low-rank matrices (appendix D, for GPT-2 and 3).")
    rank: int = Field(8, ge=1, description="Of each update (PEFT).")
    alpha: float = Field(8, gt=0, description="An update counts alpha / rank (PEFT).")
    modules: list[str] | None = Field(
        None, min_length=1, description="Names of the updated modules; none: PEFT's, mostly query and value."
    )


class FullOptions(TrainingOptions):
    """All weights of the model are trained: what parameter-efficient methods are compared with."""

    learning_rate: float = Field(
        3e-4, gt=0, description="Rate of all weights (T5 in the released code of Asai et al. 2022; Llama needs less)."
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of the list: what a job of this method takes and gives.

    All but `initialize` take `initialization` (or the sources', which is the same) and `dataset`.
    """

    name: str
    options: type[Options]
    #: `vector`: one T of the initialization. `artifact`: tensors of the method's own, which compare with nothing.
    #: `metrics`: evaluations only.
    result: Literal["initialization", "vector", "artifact", "metrics"]
    target: bool = False  #: starts from the target's own vector, which is tuned first if there is none
    sources: bool = False  #: reads the vectors of source tasks
    #: Further data sets of a job: `together`: tasks that are trained at the same time (as many as wanted);
    #: `sources`: one for each source, in their order.
    datasets: Literal["together", "sources"] | None = None


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(name="initialize", options=InitializeOptions, result="initialization"),
        Method(name="prompt-tuning", options=PromptTuningOptions, result="vector"),
        Method(name="spot", options=SpotOptions, result="vector", target=True, sources=True),
        Method(name="spot-multitask", options=SpotMultitaskOptions, result="vector", datasets="together"),
        Method(name="tpv-sum", options=TpvSumOptions, result="vector", sources=True),
        Method(name="dtvg", options=DtvgOptions, result="vector", target=True, sources=True),
        Method(name="attempt", options=AttemptOptions, result="artifact", sources=True, datasets="together"),
        Method(name="mpt", options=MptOptions, result="vector", sources=True, datasets="sources"),
        Method(name="dept", options=DeptOptions, result="artifact"),
        Method(name="lora", options=LoraOptions, result="artifact"),
        Method(name="full", options=FullOptions, result="metrics"),
    )
}


def options_of(method: str, values: Mapping[str, Any]) -> Options:
    """The validated options of a method; raises KeyError for an unknown method, pydantic.ValidationError for values."""
    return METHODS[method].options.model_validate(values)
