"""ATTEMPT: each example reads a soft prompt of its own, mixed by attention from source prompts and the target's.

Asai et al. 2022, ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts,
https://arxiv.org/abs/2205.11961. For an example with the input embeddings X (section 3.2):

    X_hat = maxpool over the tokens of X;  P_hat_j = maxpool over the rows of P_j
    H = LayerNorm(W_up SiLU(W_down X_hat))
    a_j = exp(P_hat_j . H / (d e)) / sum over k of exp(P_hat_k . H / (d e))
    P_instance = P_target + sum over j of a_j P_j

j and k go over the sources and the target: P_target is one of the candidates and is added once more, so that its
weight is 1 + a_target, never nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from tpv.methods import AttemptOptions
from tpv_worker.backbone import Prompt, Reading
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class Attempt(TuningMethod):
    """Trains a target prompt for each task and one attention: tasks * r * d + 2 * d * bottleneck + 2 * d parameters.

    The source prompts P_j = P_init + T_j are fixed, target prompts start from P_init, as the paper's do from words of
    the vocabulary. Tasks that are trained together share the attention. W_down and W_up are drawn from N(0, 0.01), as
    in the released code. Deviations: padding is left out of X_hat, so that it changes nothing, and the attention is
    not pre-trained on the sources' data.

    The paper's temperature d e suits T5, whose input embeddings are large; where they are about 0.02, as in Llama, all
    scores are about zero and all a_j nearly equal, unless the option `temperature` is lower.

    The artifact: `sources` (n, r, d), `targets` (tasks, r, d) in the order of the data sets, `down` (d, bottleneck),
    `up` (bottleneck, d), `norm_weight` and `norm_bias` (d,); float32. With the temperature that is all of the above.
    """

    artifact = True

    def __init__(self, options: AttemptOptions, given: Given) -> None:
        super().__init__()
        assert given.sources is not None
        self.options = options
        P_init, d = given.initialization, given.initialization.shape[1]
        self.temperature = options.temperature or d * math.e
        draw = torch.Generator().manual_seed(given.seed)
        self.P_s = P_init + given.sources
        self.P_t = nn.Parameter(P_init.repeat(given.tasks, 1, 1))
        self.W_down = nn.Parameter(0.01 * torch.randn(d, options.bottleneck, generator=draw).to(P_init))
        self.W_up = nn.Parameter(0.01 * torch.randn(options.bottleneck, d, generator=draw).to(P_init))
        self.norm_weight = nn.Parameter(torch.ones_like(P_init[0]))
        self.norm_bias = nn.Parameter(torch.zeros_like(P_init[0]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        rate = options.attention_learning_rate or options.learning_rate
        return [
            {"params": [self.P_t], "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {"params": [self.W_down, self.W_up], "lr": rate, "weight_decay": options.weight_decay},
            {"params": [self.norm_weight, self.norm_bias], "lr": rate, "weight_decay": 0.0},
        ]

    def prompt(self) -> Prompt:
        return partial(instance_prompts, self._tensors(), self.temperature)

    def snapshot(self) -> Snapshot:
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return Snapshot(prompt=partial(instance_prompts, tensors, self.temperature), tensors=tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "sources": self.P_s,
            "targets": self.P_t,
            "down": self.W_down,
            "up": self.W_up,
            "norm_weight": self.norm_weight,
            "norm_bias": self.norm_bias,
        }


def instance_prompts(tensors: Mapping[str, Tensor], temperature: float, reading: Reading) -> tuple[Tensor, Tensor]:
    """P_instance of each example, (batch, r, d), and the embeddings as they are; `tensors` as in the artifact."""
    sources, targets = tensors["sources"], tensors["targets"][reading.tasks]  # (n, r, d), (batch, r, d)
    weight, bias = tensors["norm_weight"], tensors["norm_bias"]
    X_hat = reading.embeddings.to(bias.dtype).masked_fill(~reading.mask[..., None], -math.inf).amax(dim=1)  # (batch, d)
    H = layer_norm(silu(X_hat @ tensors["down"]) @ tensors["up"], bias.shape, weight, bias)  # (batch, d)
    of_target = (H * targets.amax(dim=1)).sum(dim=1, keepdim=True)  # (batch, 1)
    a = (torch.cat([H @ sources.amax(dim=1).T, of_target], dim=1) / temperature).softmax(dim=1)  # (batch, n + 1)
    mixed = torch.einsum("bn,nrd->brd", a[:, :-1], sources)
    return (1 + a[:, -1, None, None]) * targets + mixed, reading.embeddings
