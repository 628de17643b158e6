from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.worker.methods.conftest import OPTIONS, copies, count, fit, same
from torch import Tensor

from tpv.methods import MptOptions
from tpv_worker.backbone import IGNORED, Backbone, Predictions
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Example, Row, Task
from tpv_worker.errors import OptionsError, TrainingDiverged
from tpv_worker.methods import Given
from tpv_worker.methods.mpt import Mpt, SourceStage, difference


def make(given: Given, **options: Any) -> Mpt:
    rates = {"learning_rate": 0.1, "task_learning_rate": 0.1}
    return Mpt(MptOptions(**{**OPTIONS, "source_steps": 10, **rates, **options}), given)


def stage(given: Given, **options: Any) -> SourceStage:
    assert given.sources is not None
    teachers = given.initialization + given.sources
    return SourceStage(MptOptions(**{**OPTIONS, **options}), given.initialization, teachers, given.seed)


@pytest.fixture
def sources(rows: list[Row]) -> list[Task]:
    """A data set for each of the three sources."""
    return [Task(train=rows[i : i + 12], validation=rows, label_words=("yes", "no")) for i in (0, 4, 8)]


def test_it_trains_as_many_parameters_as_the_paper_states(given: Given) -> None:
    """r * d + r + d: the 77.6 k of its tables for r = 100, d = 768."""
    wide = replace(given, initialization=torch.zeros(100, 768), sources=torch.zeros(6, 100, 768))
    assert count(Mpt(MptOptions(), wide)) == 77_668


def test_the_source_stage_trains_the_shared_prompt_and_two_vectors_a_source(given: Given) -> None:
    """r * d + n * (r + d), for r = 3, d = 16 and n = 3."""
    assert count(stage(given)) == 3 * 16 + 3 * (3 + 16)


def test_a_prompt_is_the_shared_one_times_a_rank_one_matrix(given: Given) -> None:
    """Eq. 2, by hand."""
    given = replace(given, initialization=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), sources=torch.zeros(1, 2, 2))
    method = make(given)
    with torch.no_grad():
        method.u.copy_(torch.tensor([10.0, 1.0]))
        method.v.copy_(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(method.snapshot().prompt, torch.tensor([[10.0, -40.0], [3.0, -8.0]]))


def test_distillation_is_the_papers_equations() -> None:
    """Eq. 3 and 4 for a vocabulary of two, by hand: one of two labels and one of two hidden states are padding."""

    def says(logit: float, state: float) -> Predictions:
        logits = torch.tensor([[[logit, 0.0], [99 * logit, 0.0]]])
        hidden = [(torch.tensor([[[state, 1.0], [9 * state, 9.0]]]), torch.tensor([[True, False]]))]
        return Predictions(logits, torch.tensor([[0, IGNORED]]), hidden)

    p = 0.75  # the teacher's, for a logit of ln 3; the student says 0.5
    from_logits = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    from_hidden = ((4 - 1) ** 2 + 0) / 2
    loss = difference(says(0.0, 1.0), says(math.log(3), 4.0))
    torch.testing.assert_close(loss, torch.tensor(from_logits + from_hidden))


def loss_of(sources: SourceStage, backbone: Backbone, batch: list[Example]) -> Tensor:
    return sources.loss(backbone, sources.prompt(), batch)


def test_the_sources_loss_is_the_weighted_sum_of_its_parts(given: Given, rows: list[Row]) -> None:
    """Eq. 5. A student that is its teacher has no distillation loss; otherwise lambda counts."""
    backbone = given.backbone
    batch = backbone.tokenize(rows[:6], MptOptions(**OPTIONS), 3, task=1)
    plain = loss_of(stage(given, distillation=0), backbone, batch)
    once, twice = (loss_of(stage(given, distillation=weight), backbone, batch) for weight in (0.5, 1.0))
    torch.testing.assert_close(plain, backbone.loss(given.initialization, batch))
    assert once > plain
    torch.testing.assert_close(twice - plain, 2 * (once - plain), rtol=1e-4, atol=1e-5)
    pupils = replace(given, sources=torch.zeros_like(given.initialization)[None].repeat(3, 1, 1))
    torch.testing.assert_close(loss_of(stage(pupils, distillation=0.9), backbone, batch), plain)


def test_only_the_shared_prompt_and_the_tasks_in_the_batch_get_gradients(given: Given, rows: list[Row]) -> None:
    sources = stage(given)
    loss_of(sources, given.backbone, given.backbone.tokenize(rows[:4], sources.options, 3, task=2)).backward()
    assert sources.P.grad is not None
    assert sources.P.grad.abs().max() > 0
    for factors in (sources.u, sources.v):
        assert factors.grad is not None
        assert [gradient.abs().max() > 0 for gradient in factors.grad] == [False, False, True]
    assert not sources.teachers.requires_grad


def test_two_tasks_of_a_batch_at_least_are_sampled(given: Given, rows: list[Row]) -> None:
    given = replace(given, sources=torch.zeros(4, *given.initialization.shape))
    sources = stage(given, distillation=0)
    batch = [given.backbone.tokenize([rows[i]], sources.options, 3, task=i)[0] for i in range(4)]
    seen = set()
    for _ in range(20):
        sources.u.grad = None
        loss_of(sources, given.backbone, list(sources.sample(batch))).backward()
        assert sources.u.grad is not None
        seen.add(tuple((sources.u.grad.abs().amax(dim=1) > 0).tolist()))
    assert {sum(tasks) for tasks in seen} == {2, 3, 4}
    assert {any(tasks[i] for tasks in seen) for i in range(4)} == {True}


def test_students_come_near_to_their_teachers(given: Given, sources: list[Task]) -> None:
    def distance(students: SourceStage) -> float:
        batch = given.backbone.tokenize(sources[0].train, students.options, 3, task=0)
        with torch.no_grad():
            return float(
                difference(
                    given.backbone.predictions(students.students()[0], batch, hidden=True),
                    given.backbone.predictions(students.teachers[0], batch, hidden=True),
                )
            )

    students = stage(given, distillation=10, learning_rate=0.05, steps=60)
    before = distance(students)
    fit(students, given, *[replace(task, validation=()) for task in sources])
    assert distance(students) < 0.7 * before


def test_the_target_starts_from_the_shared_prompt_and_the_averages(given: Given, sources: list[Task]) -> None:
    method = make(given)
    method.prepare([], sources, lambda event: None, Checkpoints())
    students = stage(given, learning_rate=0.1, steps=10)
    fit(students, given, *[replace(task, validation=()) for task in sources])
    expected = students.P * torch.outer(students.u.mean(dim=0), students.v.mean(dim=0))
    torch.testing.assert_close(method.prompt(), expected)
    assert not torch.allclose(method.prompt(), given.initialization)
    assert method.facts["source_loss"] > 0


def test_without_source_steps_it_starts_from_the_initialization(given: Given, sources: list[Task]) -> None:
    method = make(given, source_steps=0)
    method.prepare([], sources, lambda event: None, Checkpoints())
    assert torch.equal(method.snapshot().prompt, given.initialization)


def test_a_source_stage_that_diverges_is_not_taken_for_the_targets_training(given: Given, sources: list[Task]) -> None:
    method = make(replace(given, sources=torch.full_like(given.initialization, torch.nan).repeat(3, 1, 1)))
    with pytest.raises(TrainingDiverged, match="the source stage's loss or prompt is no finite number at step 1;"):
        method.prepare([], sources, lambda event: None, Checkpoints())


def test_each_source_needs_a_data_set(given: Given, sources: list[Task]) -> None:
    with pytest.raises(OptionsError, match="3 sources need a data set each; there are 2"):
        make(given).prepare([], sources[:2], lambda event: None, Checkpoints())


def test_the_shared_prompt_and_the_tasks_vectors_have_rates_of_their_own(given: Given) -> None:
    method = Mpt(MptOptions(), given)
    rates = {id(parameter): group["lr"] for group in method.parameter_groups() for parameter in group["params"]}
    assert rates == {id(method.P): 0.3, id(method.u): 0.4, id(method.v): 0.4}  # section 4.1 of the paper


def test_the_loss_falls_and_the_frozen_weights_stay(given: Given, task: Task, sources: list[Task]) -> None:
    weights = copies(given.backbone.model.state_dict())
    result, losses = fit(make(given, source_steps=5, steps=80), given, task, sources=sources)
    assert losses[-1] < 0.9 * losses[0]
    assert same(weights, given.backbone.model.state_dict())
    assert result.snapshot.prompt.shape == given.initialization.shape
    parts = result.snapshot.tensors
    torch.testing.assert_close(parts["shared"] * torch.outer(parts["u"], parts["v"]), result.snapshot.prompt)


def test_the_same_seed_gives_the_same_bytes(given: Given, task: Task, sources: list[Task]) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (
        fit(make(it, steps=3, source_steps=5), it, task, sources=sources)[0].snapshot
        for it in (given, given, replace(given, seed=8))
    )
    assert torch.equal(first.prompt, second.prompt)
    assert same(first.tensors, second.tensors)
    assert not torch.equal(first.prompt, other.prompt)
    assert torch.equal(before, torch.random.get_rng_state())
