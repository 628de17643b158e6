"""What holds for every method; what is a method's own is tested in `methods/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.methods.conftest import fit, same, scores
from torch import Tensor

from tpv.methods import METHODS, TrainingOptions
from tpv_worker import methods
from tpv_worker.backbone import Backbone
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Row, Task
from tpv_worker.methods import Given, Snapshot, TuningMethod

OPTIONS: dict[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "learning_rate": 0.1,
    "schedule": "constant",
    "separator": "|",
    "max_source_tokens": 12,
    "max_target_tokens": 2,
}
#: What so small a model needs: rates of weights and factors, and a prompt that fits its context.
OWN: dict[str, dict[str, Any]] = {
    "mpt": {"source_steps": 5, "task_learning_rate": 0.02},
    "dept": {"prompt_tokens": 2, "update_learning_rate": 0.01},
    "lora": {"learning_rate": 0.01},
    "full": {"learning_rate": 0.001},
}

ANY_MODEL = pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
ANY_METHOD = pytest.mark.parametrize("name", methods.METHODS)


class Run:
    """A method on a backbone of its own, given what `tpv.methods` says that it takes, and nothing more."""

    def __init__(self, name: str, model: Path, prompt: Tensor, rows: list[Row], **options: Any) -> None:
        listed = METHODS[name]
        target, *sources = 0.3 * torch.randn(4, *prompt.shape, generator=torch.Generator().manual_seed(3))
        task = Task(train=rows, label_words=("yes", "no"))
        self.tasks = [task, task] if listed.datasets == "together" else [task]
        self.source_tasks = [task] * 3 if listed.datasets == "sources" else []
        self.given = Given(
            backbone=Backbone.load(model),
            initialization=prompt,
            target=target if listed.target else None,
            sources=torch.stack(sources) if listed.sources else None,
            source_names=["default/a:1", "default/b:1", "default/c:1"] if listed.sources else [],
            tasks=len(self.tasks),
        )
        self.method: TuningMethod = methods.METHODS[name](
            listed.options(**{**OPTIONS, **OWN.get(name, {}), **options}), self.given
        )

    def prepare(self) -> None:
        self.method.prepare(self.tasks, self.source_tasks, lambda event: None, Checkpoints())

    def train(self) -> Snapshot:
        return fit(self.method, self.given, *self.tasks, sources=self.source_tasks)[0].snapshot

    @torch.no_grad()
    def loss(self, snapshot: Snapshot) -> float:
        """Over all rows: the losses that a run reports are each of another batch."""
        backbone = self.given.backbone
        examples = backbone.tokenize(self.tasks[0].train, TrainingOptions(**OPTIONS), len(self.given.initialization))
        return float(backbone.loss(snapshot.prompt, examples))


def tensors_of(snapshot: Snapshot) -> Mapping[str, Tensor]:
    prompt = {} if callable(snapshot.prompt) else {"prompt": snapshot.prompt}
    return {**prompt, **snapshot.tensors}


def test_the_worker_implements_exactly_what_is_listed() -> None:
    assert set(methods.METHODS) == METHODS.keys() - {"initialize"}


@ANY_MODEL
@ANY_METHOD
def test_training_lowers_the_loss_and_leaves_the_frozen_weights_alone(
    name: str, kind: str, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    run = Run(name, model_paths[kind], prompt, rows, steps=120)  # rounding does not decide whether it falls
    trained = {id(parameter) for group in run.method.parameter_groups() for parameter in group["params"]}
    frozen = [weight for weight in run.given.backbone.model.parameters() if id(weight) not in trained]
    before = [weight.clone() for weight in frozen]
    start = prompt.clone()
    run.prepare()  # what a search or the sources' stage gains does not count
    loss = run.loss(run.method.snapshot())
    snapshot = run.train()
    assert run.loss(snapshot) < 0.9 * loss
    assert torch.equal(prompt, start)
    assert bool(frozen) == (name != "full")
    assert all(map(torch.equal, frozen, before))
    if METHODS[name].result == "vector":
        assert isinstance(snapshot.prompt, Tensor)
        assert snapshot.prompt.shape == prompt.shape
        assert snapshot.prompt.dtype == torch.float32
        assert not torch.equal(snapshot.prompt, prompt)
    assert not any(tensor.requires_grad for tensor in tensors_of(snapshot).values())


@ANY_MODEL
@ANY_METHOD
def test_the_same_seed_gives_the_same_bytes(
    name: str, kind: str, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    torch.manual_seed(0)
    first = Run(name, model_paths[kind], prompt, rows, steps=4)
    torch.manual_seed(1)  # the global random state does not matter
    second = Run(name, model_paths[kind], prompt, rows, steps=4)
    assert same(tensors_of(first.train()), tensors_of(second.train()))
    assert first.method.facts == second.method.facts


@ANY_MODEL
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.result == "artifact"])
def test_an_artifact_is_all_that_is_needed(
    name: str, kind: str, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    trained = Run(name, model_paths[kind], prompt, rows, steps=4)
    snapshot = trained.train()
    loaded = Run(name, model_paths[kind], prompt, rows)
    before = scores(loaded.given.backbone, loaded.method.snapshot().prompt, rows)
    loaded.method.load(snapshot.tensors)
    after = scores(loaded.given.backbone, loaded.method.snapshot().prompt, rows)
    assert torch.equal(after, scores(trained.given.backbone, snapshot.prompt, rows))
    assert not torch.equal(before, after)


@ANY_METHOD
def test_a_snapshot_does_not_change_with_further_steps(
    name: str, model_paths: dict[str, Path], prompt: Tensor, rows: list[Row]
) -> None:
    run = Run(name, model_paths["encoder-decoder"], prompt, rows)
    run.prepare()
    snapshot = run.method.snapshot()
    before = {name: tensor.clone() for name, tensor in tensors_of(snapshot).items()}
    with torch.no_grad():
        for group in run.method.parameter_groups():
            for parameter in group["params"]:
                parameter.add_(1)
    assert same(before, tensors_of(snapshot))
