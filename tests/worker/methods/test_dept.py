from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.worker.methods.conftest import OPTIONS, copies, count, fit, same, scores

from tpv.methods import DeptOptions
from tpv_worker.backbone import Reading
from tpv_worker.data import Row, Task
from tpv_worker.errors import OptionsError
from tpv_worker.methods import Given
from tpv_worker.methods.dept import Dept


def make(given: Given, **options: Any) -> Dept:
    defaults = {"prompt_tokens": 2, "rank": 4, "learning_rate": 0.3, "update_learning_rate": 0.05}
    return Dept(DeptOptions(**{**OPTIONS, **defaults, **options}), given)


def test_it_trains_as_many_parameters_as_a_prompt_of_100_rows(given: Given) -> None:
    """The paper's comparison: m * d + (s + d) * rank = r * d for m = 40, rank = 45, s = 256, r = 100, d = 768."""
    assert count(Dept(DeptOptions(), replace(given, initialization=torch.zeros(100, 768)))) == 100 * 768


@pytest.mark.parametrize("length", [1, 2, 4])
def test_the_update_goes_by_position(given: Given, length: int) -> None:
    """rank 1, d = 2, s = 2, worked by hand: A B = ((4, 5), (-8, -10)); what is beyond s is read as it is."""
    given = replace(given, initialization=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    method = make(given, prompt_tokens=1, rank=1, max_source_tokens=2)
    method.load(
        {"prompt": torch.ones(1, 2), "A": torch.tensor([[1.0], [-2.0]]), "B": torch.tensor([[4.0, 5.0]])},
    )
    X = torch.full((3, length, 2), 0.5)
    prompt, read = method.prompt()(Reading(X, torch.ones(3, length, dtype=torch.bool), torch.zeros(3)))
    expected = torch.tensor([[4.5, 5.5], [-7.5, -9.5], [0.5, 0.5], [0.5, 0.5]])[:length].expand(3, -1, -1)
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(prompt, torch.ones(1, 2))


def test_it_starts_as_the_first_rows_of_the_initialization(given: Given, rows: list[Row]) -> None:
    start = make(given).snapshot()
    assert start.tensors["A"].abs().min() > 0
    assert start.tensors["B"].abs().max() == 0
    expected = scores(given.backbone, given.initialization[:2], rows)
    torch.testing.assert_close(scores(given.backbone, start.prompt, rows), expected)


def test_a_short_prompt_longer_than_the_initialization_is_refused(given: Given) -> None:
    with pytest.raises(OptionsError, match="prompt_tokens is 4, but the initialization has 3 rows"):
        make(given, prompt_tokens=4)


def test_prompt_and_update_have_rates_of_their_own(given: Given) -> None:
    method = make(given, learning_rate=0.3, update_learning_rate=0.05)
    rates = {id(parameter): group["lr"] for group in method.parameter_groups() for parameter in group["params"]}
    assert rates == {id(method.P_s): 0.3, id(method.A): 0.05, id(method.B): 0.05}


def test_the_loss_falls_and_the_frozen_weights_stay(given: Given, task: Task) -> None:
    weights = copies(given.backbone.model.state_dict())
    method = make(given)
    result, losses = fit(method, given, task)
    assert losses[-1] < 0.9 * losses[0]
    assert same(weights, given.backbone.model.state_dict())
    assert result.snapshot.tensors["B"].abs().max() > 0


def test_the_same_seed_gives_the_same_bytes(given: Given, task: Task) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (
        fit(make(it, steps=5), it, task)[0].snapshot.tensors for it in (given, given, replace(given, seed=8))
    )
    assert same(first, second)
    assert not torch.equal(first["A"], other["A"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_artifact_predicts_what_was_trained(given: Given, task: Task, rows: list[Row]) -> None:
    result, _ = fit(make(given, steps=5), given, task)
    method = make(replace(given, seed=8))
    method.load(load(save(dict(result.snapshot.tensors))))
    prompt = method.snapshot().prompt
    assert torch.equal(scores(given.backbone, result.snapshot.prompt, rows), scores(given.backbone, prompt, rows))
    untrained = scores(given.backbone, make(given).snapshot().prompt, rows)
    assert not torch.allclose(scores(given.backbone, prompt, rows), untrained)


def test_what_stands_beside_a_row_does_not_change_what_is_read(given: Given, task: Task, rows: list[Row]) -> None:
    prompt = fit(make(given, steps=5), given, task)[0].snapshot.prompt
    alone = torch.cat([scores(given.backbone, prompt, [row]) for row in rows])
    torch.testing.assert_close(scores(given.backbone, prompt, rows), alone, rtol=1e-4, atol=1e-4)
