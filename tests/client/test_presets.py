from __future__ import annotations

import math
from typing import Any

import pytest

from tpv.methods import DtvgOptions, TpvSumOptions, TrainingOptions, options_of
from tpv.presets import FAMILIES, PRESETS, preset_options

T5_BASE = ("T5ForConditionalGeneration", 768)
LLAMA_1B, LLAMA_3B, LLAMA_8B = (("LlamaForCausalLM", d) for d in (2048, 3072, 4096))


def options(preset: str, method: str, model: tuple[str, int], **setting: Any) -> Any:
    """What a job would train with."""
    return options_of(method, preset_options(preset, method, *model, **setting))


@pytest.mark.parametrize("few_shot", [True, False])
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("method", ["prompt-tuning", "spot", "dtvg"])
def test_dtvg_paper_has_options_for_every_model(method: str, model: tuple[str, int], few_shot: bool) -> None:
    found = options("dtvg-paper", method, model, few_shot=few_shot)
    assert (found.steps, found.evaluate_every) == ((1000, 50) if few_shot else (30_000, 1000))
    assert found.warmup_steps == (0 if few_shot else 500)
    assert found.weight_decay == 1e-5


def test_dtvg_paper_groups_as_the_released_code_does() -> None:
    found = options("dtvg-paper", "dtvg", T5_BASE, few_shot=True)
    assert isinstance(found, DtvgOptions)
    assert found == DtvgOptions(strategy="prefix")  # the defaults are the paper's few-shot setting


def test_dtvg_paper_knows_the_size_of_the_model() -> None:
    batches = [options("dtvg-paper", "dtvg", model).batch_size for model in FAMILIES]
    assert batches == [100, 32, 16, 16, 4, 2]
    rates = [options("dtvg-paper", "dtvg", model) for model in (T5_BASE, LLAMA_1B, LLAMA_3B, LLAMA_8B)]
    assert [rate.learning_rate for rate in rates] == [0.3, 1e-3, 1e-3, 1e-4]
    assert [rate.source_scale_learning_rate for rate in rates] == [0.4, 1e-3, 1e-3, 1e-4]


@pytest.mark.parametrize(("shots", "batch_size"), [(5, 2), (25, 2), (50, 8), (250, 8), (500, 16), (1000, 16)])
@pytest.mark.parametrize("method", ["prompt-tuning", "spot", "spot-multitask", "tpv-sum"])
def test_tpv_papers_batch_grows_with_the_shots(method: str, shots: int, batch_size: int) -> None:
    found = options("tpv-paper", method, T5_BASE, train_rows=shots, few_shot=True)
    assert (found.steps, found.batch_size, found.warmup_steps, found.learning_rate) == (1000, batch_size, 500, 0.3)


def test_tpv_paper_trains_ten_epochs_of_a_whole_data_set() -> None:
    t5 = options("tpv-paper", "prompt-tuning", T5_BASE, train_rows=1001)
    assert (t5.steps, t5.batch_size, t5.schedule) == (320, 32, "linear")
    llama = options("tpv-paper", "prompt-tuning", LLAMA_8B, train_rows=1000)
    assert (llama.steps, llama.batch_size, llama.schedule) == (2500, 4, "cosine")
    assert (llama.warmup_steps, llama.evaluate_every) == (75, 250)


def test_tpv_paper_searches_the_interval_of_eq_3() -> None:
    found = options("tpv-paper", "tpv-sum", T5_BASE, train_rows=100, few_shot=True)
    assert isinstance(found, TpvSumOptions)
    assert found.scales[0] == 1
    assert found.scales == sorted(found.scales, reverse=True)
    assert math.isclose(found.scales[-1], 0.05)
    assert len(found.scales) == 20


@pytest.mark.parametrize(
    ("preset", "method", "model", "setting", "message"),
    [
        ("lester-paper", "dtvg", T5_BASE, {}, "no preset 'lester-paper'; use one of dtvg-paper, tpv-paper"),
        ("dtvg-paper", "lora", T5_BASE, {}, "no figures for lora on T5-base, only for prompt-tuning, spot, dtvg"),
        ("dtvg-paper", "dtvg", ("T5ForConditionalGeneration", 64), {}, "T5ForConditionalGeneration with d = 64"),
        ("dtvg-paper", "dtvg", ("GPTNeoXForCausalLM", 768), {}, "its models are T5-small, T5-base"),
        ("dtvg-paper", "dtvg", (None, None), {}, "a model that is not known yet"),
        ("tpv-paper", "prompt-tuning", LLAMA_1B, {"train_rows": 9}, "its models are T5-base, Llama-3-8B"),
        ("tpv-paper", "dtvg", T5_BASE, {"train_rows": 9}, "no figures for dtvg"),
        ("tpv-paper", "tpv-sum", LLAMA_8B, {"train_rows": 9}, "only for prompt-tuning"),
        ("tpv-paper", "prompt-tuning", LLAMA_8B, {"train_rows": 9, "few_shot": True}, "whole data sets only"),
        ("tpv-paper", "prompt-tuning", T5_BASE, {}, "number of training rows"),
    ],
)
def test_what_a_paper_does_not_have_is_refused(
    preset: str, method: str, model: tuple[str, int], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preset_options(preset, method, *model, **setting)


def test_presets_set_nothing_that_belongs_to_the_data_or_the_machine() -> None:
    data = {"max_target_tokens", "separator", "precision", "compile"}
    for preset in PRESETS:
        found = preset_options(preset, "prompt-tuning", *T5_BASE, train_rows=9)
        assert not data & found.keys()
        assert found.keys() <= TrainingOptions.model_fields.keys()
