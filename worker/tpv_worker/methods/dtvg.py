"""Dynamic task vector grouping: the target's prompt is mixed from its own and from a changing group of source vectors.

Zhang et al. 2025, Dynamic Task Vector Grouping for Efficient Multi-Task Prompt Tuning,
https://arxiv.org/abs/2503.18063. Eq. 6:

    P_mix = P_init + alpha_t * T_t + sum over s in the group of alpha_s * T_s

with one scaling term a token row, ones at the start. Each step of Algorithm 1 groups the sources (Algorithm 2) by Eq. 2
on the rescaled vectors, merges by Eq. 6, and takes a gradient step on the target task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpv.grouping import group
from tpv.methods import DtvgOptions
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class Dtvg(TuningMethod):
    """Trains T_t (r, d), alpha_t (r,) and alpha_s (n, r): r * d + (n + 1) * r parameters; the source vectors are fixed.

    T_t starts from the target's own stage-1 vector. The two-speed rates of C.7: one for {T_t, alpha_t}, one for
    {alpha_s}. All alpha_s are one parameter and so share one AdamW state: a source outside the group has a zero
    gradient but keeps its momentum while any source is in it; on an empty group alpha_s has no gradient at all and
    AdamW leaves it and its state alone.

    Weight decay acts on T_t only. The paper gives one figure for everything (C.2), but decay pulls towards zero, and a
    scaling term's neutral value is one: it would slowly switch every source off, the unused ones too.
    """

    def __init__(self, options: DtvgOptions, given: Given) -> None:
        super().__init__()
        assert given.target is not None
        assert given.sources is not None
        self.options = options
        self.P_init, self.T_s = given.initialization, given.sources
        self.T_t = nn.Parameter(given.target.clone())
        self.alpha_t = nn.Parameter(torch.ones_like(given.target[:, 0]))
        self.alpha_s = nn.Parameter(torch.ones_like(given.sources[:, :, 0]))
        self.members: tuple[int, ...] = ()
        self.step = 0

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        return [
            {"params": [self.T_t], "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {
                "params": [self.alpha_t],
                "lr": options.target_scale_learning_rate or options.learning_rate,
                "weight_decay": 0.0,
            },
            {"params": [self.alpha_s], "lr": options.source_scale_learning_rate, "weight_decay": 0.0},
        ]

    def prompt(self) -> Tensor:
        if self.step % self.options.regroup_every == 0:
            self.members = self._group()
        self.step += 1
        return self._mix(self.members)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """The group is recomputed from the present parameters, whatever the last training step used, and then fixed."""
        members = self._group()
        tensors = {"target_vector": self.T_t, "target_scale": self.alpha_t, "source_scales": self.alpha_s}
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return Snapshot(prompt=self._mix(members), members=members, tensors=copies)

    @torch.no_grad()
    def _group(self) -> tuple[int, ...]:
        """Algorithm 2 on the pooled rescaled vectors of Eq. 2: means over the rows of alpha * T."""
        rows = len(self.alpha_t)
        target = self.alpha_t @ self.T_t / rows  # (d,)
        sources = torch.einsum("nr,nrd->nd", self.alpha_s, self.T_s) / rows
        return group(target, sources, strategy=self.options.strategy).members

    def _mix(self, members: tuple[int, ...]) -> Tensor:
        """Eq. 6."""
        mix = self.P_init + self.alpha_t[:, None] * self.T_t
        if members:
            chosen = torch.tensor(members).to(mix.device, non_blocking=True)
            mix = mix + torch.einsum("nr,nrd->rd", self.alpha_s[chosen], self.T_s[chosen])
        return mix
