"""Prompt tuning: the rows of the soft prompt are the parameters.

Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691:
maximize Pr(target | [P; source]) over P (r, d) with the model frozen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tpv.methods import TrainingOptions
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class PromptTuning(TuningMethod):
    """Trains P from P_init: r * d parameters. Weight decay acts on P itself, as in plain AdamW on a soft prompt."""

    def __init__(self, options: TrainingOptions, given: Given) -> None:
        super().__init__()
        self.options = options
        self.P = nn.Parameter(given.initialization.clone())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.P], "lr": self.options.learning_rate, "weight_decay": self.options.weight_decay}]

    def prompt(self) -> Tensor:
        return self.P

    def snapshot(self) -> Snapshot:
        return Snapshot(prompt=self.P.detach().clone())
