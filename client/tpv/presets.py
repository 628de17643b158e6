"""Presets: the hyperparameters of the two papers as options of `tpv.methods`, per model family and method.

`dtvg-paper` is Dynamic Task Vector Grouping, https://arxiv.org/abs/2503.18063; `tpv-paper` is Task Prompt Vectors,
https://arxiv.org/abs/2408.01119. In the comments C.2, 4.1, A and the like are their sections, "released" is the code
that the authors have published (zpy2477/DTVG and kinit-sk/task-prompt-vectors on GitHub). What neither says is left to
the option's default, and so are the lengths of targets, which belong to the data.

Both papers give soft prompts 100 rows, drawn from the first 5000 words (C.8; A and released): the defaults of
`tpv.methods.InitializeOptions`. With the TPV paper's T5 these are 50 that PEFT doubles (A), and of the 100 the forward
pass of PEFT (0.21 at least) reads the first 50: who wants what its figures were made with draws 50 rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

Preset = Literal["dtvg-paper", "tpv-paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

#: The models of the papers, told by their class in transformers and their width d. T5 v1.1 and flan-t5 have the class
#: and the widths of T5; the papers have the original T5.
FAMILIES: Mapping[tuple[str, int], str] = {
    ("T5ForConditionalGeneration", 512): "T5-small",
    ("T5ForConditionalGeneration", 768): "T5-base",
    ("T5ForConditionalGeneration", 1024): "T5-large",
    ("LlamaForCausalLM", 2048): "Llama-3.2-1B",
    ("LlamaForCausalLM", 3072): "Llama-3.2-3B",
    ("LlamaForCausalLM", 4096): "Llama-3-8B",
}

Values = dict[str, Any]


def preset_options(
    preset: str,
    method: str,
    architecture: str | None,
    token_dim: int | None,
    *,
    train_rows: int | None = None,
    few_shot: bool = False,
) -> Values:
    """The options that a paper sets for a method on a model; the others keep their defaults.

    `architecture` is the class of the model in transformers, `token_dim` its d. Both papers have one setting for whole
    data sets and one for few shots (`few_shot`). `train_rows` are the training rows of the job, which `tpv-paper`
    needs: it counts epochs, and its batch grows with the shots.

    Raises ValueError for an unknown preset, and for a method, a model or a setting that the paper does not have.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; use one of {', '.join(PRESETS)}")
    family = FAMILIES.get((architecture or "", token_dim or 0))
    if preset == "dtvg-paper":
        table, methods = _DTVG_MODELS, _DTVG_METHODS
    else:
        table, methods = _TPV_MODELS, _TPV_METHODS
    if family is None or family not in table:
        model = "a model that is not known yet" if architecture is None else f"{architecture} with d = {token_dim}"
        raise ValueError(f"{preset} has no figures for {model}; its models are {', '.join(table)}")
    if method not in methods[family]:
        raise ValueError(f"{preset} has no figures for {method} on {family}, only for {', '.join(methods[family])}")
    setting = _dtvg(few_shot) if preset == "dtvg-paper" else _tpv(family, train_rows, few_shot)
    return {**table[family], **setting, **methods[family][method]}


# --- dtvg-paper -------------------------------------------------------------------------------------------------------

_DTVG_MODELS: Mapping[str, Values] = {
    "T5-small": {"batch_size": 100, "learning_rate": 0.3},  # C.4; C.7
    "T5-base": {"batch_size": 32, "learning_rate": 0.3},  # C; C.7
    "T5-large": {"batch_size": 16, "learning_rate": 0.3},  # C.4; C.7
    "Llama-3.2-1B": {"batch_size": 16, "learning_rate": 1e-3},  # C.5
    "Llama-3.2-3B": {"batch_size": 4, "learning_rate": 1e-3},  # C.5
    "Llama-3-8B": {"batch_size": 2, "learning_rate": 1e-4},  # C.5
}


def _dtvg_methods(source_rate: float) -> Mapping[str, Values]:
    """The target's scaling term has the rate of its prompt (C.7), which is the option's default."""
    return {
        "prompt-tuning": {},
        "spot": {"metric": "cosine-prompt"},  # C.1
        # Algorithm 2 of the paper is `greedy`; what the released code runs, and so what made the figures, is `prefix`.
        "dtvg": {"strategy": "prefix", "regroup_every": 1, "source_scale_learning_rate": source_rate},
    }


_DTVG_METHODS: Mapping[str, Mapping[str, Values]] = {
    # T5: C.7 for few shots; for whole data sets C.7 searches 0.4, 0.6, 0.8 and 1, and 0.3, 0.4 and 0.5 for the rest.
    # Llama: the text has one rate for the soft prompt and its scaling term; the sources' is that too (released, 1B).
    family: _dtvg_methods(0.4 if family.startswith("T5") else values["learning_rate"])
    for family, values in _DTVG_MODELS.items()
}


def _dtvg(few_shot: bool) -> Values:
    values = {"weight_decay": 1e-5, "schedule": "linear", "max_source_tokens": 256}  # C.2; C.2; C
    if few_shot:
        return values | {"steps": 1000, "evaluate_every": 50, "warmup_steps": 0}  # C.3; no warm-up is spoken of
    # 4.1, of targets: sources take 300 000; released; C.2
    return values | {"steps": 30_000, "evaluate_every": 1000, "warmup_steps": 500}


# --- tpv-paper --------------------------------------------------------------------------------------------------------

_TPV_MODELS: Mapping[str, Values] = {
    "T5-base": {  # all A
        "learning_rate": 0.3,
        "weight_decay": 1e-5,
        "schedule": "linear",  # the Seq2SeqTrainer's
        "max_source_tokens": 256,
    },
    "Llama-3-8B": {  # 3.1-8B-Instruct: as T5-base but for the cosine (A); batch and length are the released ones
        "learning_rate": 0.3,
        "weight_decay": 1e-5,
        "schedule": "cosine",
        "batch_size": 4,
        "max_source_tokens": 512,
    },
}

_TPV_METHODS: Mapping[str, Mapping[str, Values]] = {
    "T5-base": {
        "prompt-tuning": {},
        "spot": {},
        "spot-multitask": {},
        # 0 < scale <= 1 (Eq. 3), searched on validation rows (A) in steps of 0.05 (released); of ties the plain sum.
        "tpv-sum": {"scales": [i / 20 for i in range(20, 0, -1)]},
    },
    "Llama-3-8B": {"prompt-tuning": {}},
}

_EPOCHS = 10  # A; 50 for TREC


def _tpv(family: str, train_rows: int | None, few_shot: bool) -> Values:
    if train_rows is None:
        raise ValueError("tpv-paper needs the number of training rows: it counts epochs, and batches grow with shots")
    if family == "Llama-3-8B":
        if few_shot:
            raise ValueError("tpv-paper tunes Llama-3-8B on whole data sets only")
        steps = _EPOCHS * math.ceil(train_rows / 4)
        # Released: 3 % of the steps warm up, and every tenth part of them is evaluated.
        return {"steps": steps, "warmup_steps": math.ceil(0.03 * steps), "evaluate_every": math.ceil(steps / 10)}
    values = {"evaluate_every": 100, "warmup_steps": 500}  # A
    if not few_shot:
        return values | {"steps": _EPOCHS * math.ceil(train_rows / 32), "batch_size": 32}  # A
    # A: batches of 2 for 5, 10 and 25 shots, of 8 for 50, 100 and 250, of 16 for 500, 750 and 1000.
    batch_size = 2 if train_rows < 50 else 8 if train_rows < 500 else 16
    return values | {"steps": 1000, "batch_size": batch_size}
