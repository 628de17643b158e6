from __future__ import annotations

import math
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from tpv.methods import METHODS, DtvgOptions, PromptTuningOptions
from tpv_worker import methods
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task, batches
from tpv_worker.methods import Dtvg, Given, PromptTuning
from tpv_worker.training import train

R, D = 3, 16


def vectors(n: int, seed: int = 0, shape: tuple[int, int] = (R, D)) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def given(P_init: Tensor, T_t: Tensor, *sources: Tensor) -> Given:
    backbone: Any = None  # these methods do not look at the model
    return Given(backbone=backbone, initialization=P_init, target=T_t, sources=torch.stack(sources))


def make(n: int, seed: int = 0, **options: Any) -> Dtvg:
    return Dtvg(DtvgOptions(**options), given(*vectors(n + 2, seed)))


def test_the_worker_implements_exactly_what_is_listed() -> None:
    assert set(methods.METHODS) == METHODS.keys() - {"initialize"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_made_the_same_way(name: str) -> None:
    P_init, *_ = tensors = vectors(4)
    method = methods.METHODS[name](METHODS[name].options(), given(*tensors))
    prompt = method.snapshot().prompt
    assert isinstance(prompt, Tensor)
    assert prompt.shape == P_init.shape
    assert not prompt.requires_grad


def count(groups: list[dict[str, Any]]) -> int:
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def test_trained_parameter_counts_of_the_papers() -> None:
    """r = 100, d = 768: 76.8 k for prompt tuning, 77.5 k for DTVG with six sources (Table 7 of its paper)."""
    zeros = given(*torch.zeros(8, 100, 768))
    assert count(PromptTuning(PromptTuningOptions(), zeros).parameter_groups()) == 76_800
    dtvg = Dtvg(DtvgOptions(), zeros)
    assert count(dtvg.parameter_groups()) == 76_800 + 100 + 6 * 100


def test_dtvg_has_two_speeds_and_no_decay_on_scaling_terms() -> None:
    method = make(2, learning_rate=0.3, source_scale_learning_rate=0.4, weight_decay=0.1)
    speeds = {id(p): (g["lr"], g["weight_decay"]) for g in method.parameter_groups() for p in g["params"]}
    assert speeds == {id(method.T_t): (0.3, 0.1), id(method.alpha_t): (0.3, 0.0), id(method.alpha_s): (0.4, 0.0)}
    slow = make(2, learning_rate=0.3, target_scale_learning_rate=0.01)
    assert [group["lr"] for group in slow.parameter_groups()][1] == 0.01


def test_dtvg_starts_from_the_plain_sum() -> None:
    method = make(4)
    members = method.snapshot().members
    assert members
    expected = method.P_init + method.T_t + method.T_s[list(members)].sum(0)
    torch.testing.assert_close(method.prompt(), expected)


def test_gradients_reach_the_target_and_the_group_only() -> None:
    method = next(method for seed in range(99) if len((method := make(5, seed)).snapshot().members or ()) == 2)
    method.prompt().square().sum().backward()
    members = list(method.members)
    others = [i for i in range(5) if i not in members]
    assert method.T_t.grad is not None
    assert method.T_t.grad.abs().min() > 0
    assert method.alpha_t.grad is not None
    assert method.alpha_t.grad.abs().min() > 0
    assert method.alpha_s.grad is not None
    assert method.alpha_s.grad[members].abs().min() > 0
    assert method.alpha_s.grad[others].abs().max() == 0
    assert method.T_s.grad is None
    assert method.P_init.grad is None


def test_an_empty_group_leaves_the_sources_scales_and_their_optimizer_state_alone() -> None:
    method = make(3)
    optimizer = torch.optim.AdamW(method.parameter_groups())
    method.prompt().square().sum().backward()
    assert method.members
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scales = method.alpha_s.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[method.alpha_s].items()}

    method.T_s = -method.T_s.abs() * method.T_t.detach().mean(0).sign()  # now every source opposes the target
    target = method.T_t.detach().clone()
    method.prompt().square().sum().backward()
    assert method.members == ()
    assert method.alpha_s.grad is None
    optimizer.step()
    assert torch.equal(method.alpha_s, scales)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[method.alpha_s].items())
    assert not torch.equal(method.T_t, target)


def test_the_group_is_recomputed_every_k_steps_and_for_a_snapshot() -> None:
    method = make(4, regroup_every=3)
    first = method.prompt() is not None and method.members
    assert first
    with torch.no_grad():
        method.T_t.neg_()
    turned = method.snapshot().members
    assert turned != first
    for expected in (first, first, turned, turned):
        method.prompt()
        assert method.members == expected


def test_a_snapshot_does_not_change_with_further_steps() -> None:
    method = make(3)
    snapshot = method.snapshot()
    before = {name: tensor.clone() for name, tensor in {"prompt": snapshot.prompt, **snapshot.tensors}.items()}
    with torch.no_grad():
        for group in method.parameter_groups():
            group["params"][0].add_(1)
    after = {"prompt": snapshot.prompt, **snapshot.tensors}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name: tuple(t.shape) for name, t in snapshot.tensors.items()} == {
        "target_vector": (R, D),
        "target_scale": (R,),
        "source_scales": (3, R),
    }


# A literal transcription of Algorithms 1 and 2, in double loops and by the chain rule, against the real run.


def similarity(T_1: Tensor, T_2: Tensor) -> float:
    """Eq. 2, token by token."""
    r = len(T_1)
    return sum(float(T_1[i] @ T_2[j]) for i in range(r) for j in range(r)) / r**2


def knowledge_consistency(group: list[Tensor]) -> float:
    """Eq. 4."""
    n = len(group)
    if n < 2:
        return 0.0
    return 2 / (n * (n - 1)) * sum(similarity(group[i], group[j]) for i in range(n) for j in range(i + 1, n))


def algorithm_2(T_t: Tensor, T_s: list[Tensor]) -> list[int]:
    ranking = sorted(range(len(T_s)), key=lambda i: -similarity(T_t, T_s[i]))
    group: list[int] = []
    for i in ranking:
        delta = knowledge_consistency([T_s[j] for j in [*group, i]]) - knowledge_consistency([T_s[j] for j in group])
        if similarity(T_t, T_s[i]) >= 0 and delta >= 0:
            group.append(i)
    return group


class Adam:
    """Kingma & Ba, Algorithm 1, on one tensor."""

    def __init__(self, shape: torch.Size) -> None:
        self.m, self.v, self.t = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0

    def step(self, gradient: Tensor, rate: float) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        return -rate * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)


STEPS = 20


def test_training_is_algorithm_1(backbone: Backbone, rows: list[Row]) -> None:
    options = DtvgOptions(
        steps=STEPS, batch_size=8, learning_rate=0.03, source_scale_learning_rate=0.04, weight_decay=0.01, separator="|"
    )
    P_init, T_t, *sources = vectors(6, SEED[backbone.kind]) * torch.tensor([2.0, *[0.1] * 5])[:, None, None]
    method = Dtvg(options, given(P_init, T_t, *sources))
    result = train(backbone, method, [Task(train=rows, label_words=None)], options=options, seed=0)

    examples = backbone.tokenize(rows, options, R)
    order = islice(batches([len(example.source) for example in examples], 8, 0), STEPS)
    T_t, T_s = T_t.double(), torch.stack(sources).double()
    alpha_t, alpha_s = torch.ones(R, dtype=torch.float64), torch.ones(4, R, dtype=torch.float64)
    adam_T_t, adam_t, adam_s = Adam(T_t.shape), Adam(alpha_t.shape), Adam(alpha_s.shape)
    groups = []
    for step, indices in enumerate(order):
        group = algorithm_2(alpha_t[:, None] * T_t, [alpha_s[i][:, None] * T_s[i] for i in range(4)])
        groups.append(tuple(group))
        P_mix = P_init + alpha_t[:, None] * T_t
        for i in group:
            P_mix = P_mix + alpha_s[i][:, None] * T_s[i]
        P_mix = P_mix.float().requires_grad_()
        (gradient,) = torch.autograd.grad(backbone.loss(P_mix, [examples[i] for i in indices]), P_mix)
        of_T_t, of_alpha_t = alpha_t[:, None] * gradient, (T_t * gradient).sum(1)
        of_alpha_s = torch.stack([(T_s[i] * gradient).sum(1) * (i in group) for i in range(4)])
        share = (STEPS - step) / STEPS  # linear schedule
        T_t = T_t * (1 - share * 0.03 * 0.01) + adam_T_t.step(of_T_t, share * 0.03)
        alpha_t = alpha_t + adam_t.step(of_alpha_t, share * 0.03)
        if group:
            alpha_s = alpha_s + adam_s.step(of_alpha_s, share * 0.04)

    assert () in groups, "an empty group has to be among the steps"
    assert len(set(groups)) > 2
    changes = [(i + 1, g) for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
    assert result.groups == changes
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5, check_dtype=False)
    close(result.snapshot.tensors["target_vector"], T_t)
    close(result.snapshot.tensors["target_scale"], alpha_t)
    close(result.snapshot.tensors["source_scales"], alpha_s)
    final = algorithm_2(alpha_t[:, None] * T_t, [alpha_s[i][:, None] * T_s[i] for i in range(4)])
    assert result.snapshot.members == tuple(final)
    P_star = P_init + alpha_t[:, None] * T_t + sum(alpha_s[i][:, None] * T_s[i] for i in final)
    close(result.snapshot.prompt, P_star)
    assert math.isfinite(result.loss)


#: Of the vectors in `test_training_is_algorithm_1`: chosen so that some steps have an empty group.
SEED = {"encoder-decoder": 59, "decoder-only": 81}
