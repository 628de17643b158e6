from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.worker.methods.conftest import OPTIONS, copies, count, fit, same, scores
from torch import Tensor

from tpv.methods import AttemptOptions
from tpv_worker.backbone import Reading
from tpv_worker.data import Row, Task
from tpv_worker.methods import Given
from tpv_worker.methods.attempt import Attempt


def make(given: Given, **options: Any) -> Attempt:
    # At the paper's temperature the attention of so narrow a model is nearly uniform.
    return Attempt(AttemptOptions(**{**OPTIONS, "temperature": 2, "learning_rate": 0.1, **options}), given)


@pytest.mark.parametrize(("tasks", "expected"), [(1, 231_936), (3, 385_536)])
def test_it_trains_as_many_parameters_as_the_paper_states(given: Given, tasks: int, expected: int) -> None:
    """r = 100, d = 768: the 232 k of its tables for one task, and one target prompt more for each further one."""
    wide = replace(given, initialization=torch.zeros(100, 768), sources=torch.zeros(6, 100, 768), tasks=tasks)
    assert count(Attempt(AttemptOptions(), wide)) == expected


def test_an_instance_prompt_is_the_papers_equation(given: Given) -> None:
    """d = 2, r = 2, one source; the third token is padding, and would win every maximum."""
    P_init, T = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    method = Attempt(
        AttemptOptions(bottleneck=1, temperature=4), replace(given, initialization=P_init, sources=T[None])
    )
    tensors = copies(dict(method.snapshot().tensors))
    method.load({**tensors, "down": torch.tensor([[1.0], [0.5]]), "up": torch.tensor([[3.0, -1.0]])})
    reading = Reading(
        torch.tensor([[[2.0, -4.0], [-3.0, 6.0], [99.0, 99.0]]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([0]),
    )

    down = 2.0 + 0.5 * 6.0  # X_hat = (2, 6)
    silu = down / (1 + math.exp(-down))
    up = (3 * silu, -silu)  # mean silu, deviations +-2 silu
    H = (up[0] - silu) / math.sqrt(4 * silu**2 + 1e-5), (up[1] - silu) / math.sqrt(4 * silu**2 + 1e-5)
    source, target = (3.0, 3.0), (1.0, 2.0)  # maxima over the rows of P_init + T = ((3, 0), (-1, 3)) and of P_init
    scores = [(H[0] * P[0] + H[1] * P[1]) / 4 for P in (source, target)]
    a_source, a_target = (math.exp(score) / sum(map(math.exp, scores)) for score in scores)
    expected = (1 + a_target) * P_init + a_source * (P_init + T)

    prompt, embeddings = method.prompt()(reading)
    torch.testing.assert_close(prompt[0], expected, rtol=1e-5, atol=1e-6)
    assert embeddings is reading.embeddings


def test_the_temperature_is_the_width_times_e(given: Given) -> None:
    assert Attempt(AttemptOptions(), given).temperature == pytest.approx(16 * math.e)


def test_the_loss_falls_and_neither_model_nor_sources_change(given: Given, task: Task) -> None:
    weights = copies(given.backbone.model.state_dict())
    method = make(given)
    sources = method.snapshot().tensors["sources"]
    _, losses = fit(method, given, task)
    assert losses[-1] < 0.9 * losses[0]
    assert same(weights, given.backbone.model.state_dict())
    assert torch.equal(sources, method.snapshot().tensors["sources"])


def test_the_same_seed_gives_the_same_bytes(given: Given, task: Task) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (
        fit(make(it, steps=5), it, task)[0].snapshot.tensors for it in (given, given, replace(given, seed=8))
    )
    assert same(first, second)
    assert not torch.equal(first["down"], other["down"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_artifact_predicts_what_was_trained(given: Given, task: Task, rows: list[Row]) -> None:
    result, _ = fit(make(given, steps=5), given, task)
    file = save(dict(result.snapshot.tensors))
    method = make(replace(given, sources=torch.zeros_like(given.sources), seed=8))  # the artifact holds the sources
    method.load(load(file))
    prompt = method.snapshot().prompt
    assert torch.equal(scores(given.backbone, result.snapshot.prompt, rows), scores(given.backbone, prompt, rows))
    assert not torch.allclose(scores(given.backbone, prompt, rows), scores(given.backbone, given.initialization, rows))


def test_what_stands_beside_a_row_does_not_change_its_prompt(given: Given, rows: list[Row]) -> None:
    prompt = make(given).snapshot().prompt
    alone = torch.cat([scores(given.backbone, prompt, [row]) for row in rows])
    torch.testing.assert_close(scores(given.backbone, prompt, rows), alone, rtol=1e-4, atol=1e-4)


def test_tasks_that_are_trained_together_have_prompts_of_their_own_and_share_the_attention(
    given: Given, rows: list[Row]
) -> None:
    """One task's rows are all `yes`, the other's all `no`: no single prompt could give more than half of both."""
    given = replace(given, tasks=2)
    tasks = [Task(train=[Row(row.source, word) for row in rows], label_words=("yes", "no")) for word in ("yes", "no")]
    method = make(given, steps=80, learning_rate=0.3, attention_learning_rate=0.01)

    loss = given.backbone.loss(method.prompt(), given.backbone.tokenize(rows[:4], method.options, 3, task=1))
    loss.backward()
    gradients: list[Tensor] = [p.grad for group in method.parameter_groups() for p in group["params"]]
    assert gradients[0][0].abs().max() == 0
    assert gradients[0][1].abs().max() > 0
    assert all(gradient.abs().max() > 0 for gradient in gradients[1:])
    for group in method.parameter_groups():
        for parameter in group["params"]:
            parameter.grad = None

    result, _ = fit(method, given, *tasks)
    for number, task in enumerate(tasks):
        best = scores(given.backbone, result.snapshot.prompt, task.train, number).argmax(dim=1)
        assert (best == number).float().mean() > 0.75
