"""Full fine-tuning: all weights of the model are trained; a reference point, no soft prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpv.methods import FullOptions
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class Full(TuningMethod):
    """Trains every weight of the backbone's model, in place; weights that the model ties stay tied and count once.

    There is no soft prompt: the model reads the source alone, and P_init is not used. Dropout is off, as everywhere
    here. The weights become float32, whatever the option `precision` has made of them. Nothing is registered: a
    snapshot's tensors are the model's weights by their names in it, on its device, so that `load` can bring the best
    step back; two copies of them at most are held beside the model.
    """

    artifact = True

    def __init__(self, options: FullOptions, given: Given) -> None:
        super().__init__()
        self.options = options
        self.weights = dict(given.backbone.model.float().requires_grad_(True).named_parameters())
        self.nothing = given.initialization[:0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        params = list(self.weights.values())
        return [{"params": params, "lr": options.learning_rate, "weight_decay": options.weight_decay}]

    def prompt(self) -> Tensor:
        return self.nothing

    def snapshot(self) -> Snapshot:
        tensors = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return Snapshot(prompt=self.nothing, tensors=tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])
