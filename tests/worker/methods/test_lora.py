from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save, save_file
from tests.worker.methods.conftest import OPTIONS, copies, count, fit, same, scores

from tpv.methods import LoraOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.errors import OptionsError
from tpv_worker.methods import Given
from tpv_worker.methods.lora import Lora


def make(given: Given, **options: Any) -> Lora:
    return Lora(LoraOptions(**{**OPTIONS, "rank": 2, "alpha": 6, "learning_rate": 0.05, **options}), given)


@pytest.fixture
def again(fresh: Given, model_paths: dict[str, Path]) -> Given:
    """Another backbone from the same files."""
    return replace(fresh, backbone=Backbone.load(model_paths[fresh.backbone.kind]), seed=8)


def test_it_trains_as_many_parameters_as_the_paper_states(fresh: Given) -> None:
    """rank * (k + l) for the query and value matrices: of T5's six attentions, of Llama's two."""
    matrices = {"encoder-decoder": 12 * [(16, 16)], "decoder-only": 2 * [(16, 16), (8, 16)]}[fresh.backbone.kind]
    assert count(make(fresh)) == sum(2 * (k + width) for k, width in matrices)


def test_a_layer_computes_the_papers_equation(fresh: Given) -> None:
    """Eq. 3: W_0 x + (alpha / rank) B A x."""
    name = {
        "encoder-decoder": "encoder.block.0.layer.0.SelfAttention.q",
        "decoder-only": "model.layers.0.self_attn.q_proj",
    }
    layer = name[fresh.backbone.kind]
    W_0 = fresh.backbone.model.get_submodule(layer).weight.clone()
    method = make(fresh)
    draw = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(value.shape, generator=draw) for key, value in method.snapshot().tensors.items()}
    method.load(tensors)
    A, B = (tensors[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    x = torch.randn(5, 16, generator=draw)
    torch.testing.assert_close(fresh.backbone.model.get_submodule(layer)(x), x @ W_0.T + 6 / 2 * x @ A.T @ B.T)


def test_it_starts_as_the_model_without_a_prompt(fresh: Given, rows: list[Row]) -> None:
    plain = scores(fresh.backbone, fresh.initialization[:0], rows)
    start = make(fresh).snapshot()
    assert start.prompt.shape == (0, 16)
    assert torch.equal(scores(fresh.backbone, start.prompt, rows), plain)


def test_the_loss_falls_and_the_models_own_weights_stay(fresh: Given, task: Task) -> None:
    weights = copies(fresh.backbone.model.state_dict())
    _, losses = fit(make(fresh), fresh, task)
    assert losses[-1] < 0.9 * losses[0]
    after = {n.replace("base_layer.", ""): w for n, w in fresh.backbone.model.state_dict().items() if "lora_" not in n}
    assert same(weights, after)


def test_the_same_seed_gives_the_same_bytes(fresh: Given, again: Given, task: Task) -> None:
    before = torch.random.get_rng_state()
    first, _ = fit(make(fresh, steps=5), fresh, task)
    second, _ = fit(make(replace(again, seed=fresh.seed), steps=5), replace(again, seed=fresh.seed), task)
    assert same(first.snapshot.tensors, second.snapshot.tensors)
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_seed_starts_from_another_draw(fresh: Given, again: Given) -> None:
    first, other = make(fresh).snapshot().tensors, make(again).snapshot().tensors
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


def test_an_artifact_predicts_what_was_trained(fresh: Given, again: Given, task: Task, rows: list[Row]) -> None:
    plain = scores(fresh.backbone, fresh.initialization[:0], rows)
    result, _ = fit(make(fresh, steps=5), fresh, task)
    method = make(again)
    method.load(load(save(dict(result.snapshot.tensors))))
    trained = scores(fresh.backbone, result.snapshot.prompt, rows)
    assert torch.equal(scores(again.backbone, method.snapshot().prompt, rows), trained)
    assert not torch.allclose(trained, plain)


def test_the_best_step_is_what_is_left_in_the_model(fresh: Given, task: Task, rows: list[Row]) -> None:
    """At so high a rate the steps differ; the model computes what the result says, not what the last step left."""
    method = make(fresh, learning_rate=1.0, evaluate_every=1, steps=12)
    result, _ = fit(method, fresh, replace(task, validation=rows))
    assert result.best_step < result.steps
    assert same(result.snapshot.tensors, method.snapshot().tensors)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT 0.21
def test_peft_loads_the_artifact(fresh: Given, again: Given, task: Task, rows: list[Row], tmp_path: Path) -> None:
    method = make(fresh, steps=5)
    result, _ = fit(method, fresh, task)
    save_file(dict(result.snapshot.tensors), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.facts["adapter_config"]))
    again.backbone.model = PeftModel.from_pretrained(again.backbone.model, tmp_path).get_base_model()
    trained = scores(fresh.backbone, result.snapshot.prompt, rows)
    assert torch.equal(scores(again.backbone, result.snapshot.prompt, rows), trained)


def test_what_is_trained_of_a_rounded_model_is_float32(fresh: Given, task: Task) -> None:
    fresh.backbone.model.bfloat16()
    result, losses = fit(make(fresh), fresh, task)
    assert {tensor.dtype for tensor in result.snapshot.tensors.values()} == {torch.float32}
    assert losses[-1] < 0.9 * losses[0]


def test_modules_that_the_model_does_not_have_are_refused(fresh: Given) -> None:
    with pytest.raises(OptionsError, match=r"modules: .*no_such_module"):
        make(fresh, modules=["no_such_module"])
