"""Dynamic task vector grouping: the target's prompt is mixed from its own and from a changing group of source vectors.

Zhang et al. 2025, Dynamic Task Vector Grouping for Efficient Multi-Task Prompt Tuning,
https://arxiv.org/abs/2503.18063. Eq. 6:

    P_mix = P_init + alpha_t * T_t + sum over s in the group of alpha_s * T_s

with one scaling term a token row, ones at the start. Each step of Algorithm 1 groups the sources (Algorithm 2) by Eq. 2
on the rescaled vectors, merges by Eq. 6, and takes a gradient step on the target task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpv.grouping import EXACT_LIMIT, PAIRS_LIMIT, group
from tpv.methods import DtvgOptions
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Task
from tpv_worker.errors import OptionsError, TrainingDiverged
from tpv_worker.methods.protocol import Given, Report, Snapshot, TuningMethod
from tpv_worker.methods.watch import Watch
from tpv_worker.training import LOG_EVERY

LIMITS = {"exact": EXACT_LIMIT, "knowledge-consistency": PAIRS_LIMIT}  #: sources, by strategy


class Dtvg(TuningMethod):
    """Trains T_t (r, d), alpha_t (r,) and alpha_s (n, r): r * d + (n + 1) * r parameters; the source vectors are fixed.

    T_t starts from the target's own stage-1 vector. The two-speed rates of C.7: one for {T_t, alpha_t}, one for
    {alpha_s}. All alpha_s are one parameter and so share one AdamW state: a source outside the group has a zero
    gradient but keeps its momentum while any source is in it; on an empty group alpha_s has no gradient at all and
    AdamW leaves it and its state alone.

    Weight decay acts on T_t only. The paper gives one figure for everything (C.2), but decay pulls towards zero, and a
    scaling term's neutral value is one: it would slowly switch every source off, the unused ones too.

    The ablations of 4.3: `only-target` has no group at all, so alpha_s is not trained (r * d + r parameters);
    `fixed-group` keeps the group of the start. With `center`, ours, the pooled vectors of Eq. 2 are taken less the
    centre of a reference pool (`tpv.similarity.dot_centered`).
    """

    def __init__(self, options: DtvgOptions, given: Given) -> None:
        """Raises OptionsError for options that do not fit what is given."""
        super().__init__()
        assert given.target is not None
        assert given.sources is not None
        n = len(given.sources)
        limit = LIMITS.get(options.strategy, n)
        if n > limit:
            raise OptionsError(
                f"the strategy {options.strategy} takes at most {limit} sources, and here are {n}; use greedy"
            )
        if options.center and given.center is None:
            raise OptionsError("`center` needs the mean pooled vector of a reference pool, and none is given")
        self.options = options
        self.center = given.center if options.center else None
        self.P_init, self.T_s = given.initialization, given.sources
        self.T_t = nn.Parameter(given.target.clone())
        self.alpha_t = nn.Parameter(torch.ones_like(given.target[:, 0]))
        self.alpha_s = nn.Parameter(torch.ones_like(given.sources[:, :, 0]))
        self.step = 0
        self.members: tuple[int, ...] = () if options.grouping == "only-target" else self._group()

        self.names = given.source_names or [f"source {i}" for i in range(n)]
        largest = 0 if options.grouping == "only-target" else min(n, options.max_size or n)
        self.watch = Watch(options.steps, self.names, largest)
        self.facts = self.watch.facts

    def prepare(
        self, tasks: Sequence[Task], source_tasks: Sequence[Task], report: Report, checkpoints: Checkpoints
    ) -> None:
        self.watch.report = report

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "members": self.members, "watch": self.watch.state()}

    def resume(self, state: Mapping[str, Any], report: Report) -> None:
        self.step, self.members = state["step"], tuple(state["members"])
        self.watch.resume(state["watch"], report)

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        of_target = [
            {"params": [self.T_t], "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {
                "params": [self.alpha_t],
                "lr": options.target_scale_learning_rate or options.learning_rate,
                "weight_decay": 0.0,
            },
        ]
        if options.grouping == "only-target":
            return of_target
        return [*of_target, {"params": [self.alpha_s], "lr": options.source_scale_learning_rate, "weight_decay": 0.0}]

    def prompt(self) -> Tensor:
        if self.options.grouping == "dynamic" and self.step % self.options.regroup_every == 0:
            self.members = self._group()
        if self.step and self.step % LOG_EVERY == 0:  # the loop has just waited for the device
            self._look(self.members)
        self.step += 1
        self.watch.saw(self.members)
        return self._mix(self.members)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A dynamic group is recomputed from the present parameters, whatever the last step used, and then fixed."""
        members = self._group() if self.options.grouping == "dynamic" else self.members
        self._look(members)
        tensors = {"target_vector": self.T_t, "target_scale": self.alpha_t, "source_scales": self.alpha_s}
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return Snapshot(prompt=self._mix(members), members=members, tensors=copies)

    @torch.no_grad()
    def _look(self, members: tuple[int, ...]) -> None:
        sizes = torch.cat([self.alpha_t[None], self.alpha_s[list(members)]]).abs().mean(dim=1).tolist()
        self.watch.sizes(zip(["the target", *(self.names[i] for i in members)], sizes, strict=True))

    @torch.no_grad()
    def _group(self) -> tuple[int, ...]:
        """Algorithm 2 on the pooled rescaled vectors of Eq. 2: means over the rows of alpha * T."""
        options, rows = self.options, len(self.alpha_t)
        target: Any = self.alpha_t @ self.T_t / rows  # (d,)
        sources: Any = torch.bmm(self.alpha_s[:, None], self.T_s)[:, 0] / rows  # (n, d)
        if self.center is not None:
            target, sources = target - self.center, sources - self.center
        if sources.device.type == "cpu":  # NumPy's views of the same memory: only the products asked for are taken
            target, sources = target.numpy(), sources.numpy()
        try:
            return group(
                target,
                sources,
                strategy=options.strategy,
                trade_off=options.trade_off,
                max_size=options.max_size,
                min_similarity=options.min_similarity,
                trace_size=0,
            ).members
        except ValueError as error:  # options, shapes and the number of sources do fit
            raise TrainingDiverged(self.step, "similarity of a source") from error

    def _mix(self, members: tuple[int, ...]) -> Tensor:
        """Eq. 6."""
        mix = self.P_init + self.alpha_t[:, None] * self.T_t
        if members:
            chosen = torch.tensor(members).to(mix.device, non_blocking=True)
            mix = mix + torch.einsum("nr,nrd->rd", self.alpha_s[chosen], self.T_s[chosen])
        return mix
