"""DePT: a short soft prompt, and a low-rank update of the word embeddings in place of the rows that it lacks.

Shi and Lipani 2024, DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning,
https://arxiv.org/abs/2309.05173, section 2.2. With the short prompt P_s (m, d), A (s, rank) and B (rank, d), the model
reads

    [P_s; X + A B]

X (s, d) being the embeddings of a source of s tokens: row i of A B belongs to the i-th place, whatever word is there.
P_s and {A, B} have learning rates of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tpv.methods import DeptOptions
from tpv_worker.backbone import Prompt, Reading
from tpv_worker.errors import OptionsError
from tpv_worker.methods.protocol import Given, Snapshot, TuningMethod


class Dept(TuningMethod):
    """Trains m * d + (s + d) * rank parameters, s being `max_source_tokens`; a shorter source has A B's first rows.

    With (s + d) * rank = (r - m) * d that is as many as a soft prompt of r rows has, the paper's comparison: the
    defaults are its 40 rows and rank 45 for r = 100, d = 768, s = 256. P_s starts from the first m rows of P_init. As
    in LoRA, A starts from a Gaussian and B from zero; the paper does not give its width, 1 / sqrt(3 rank) here is the
    one of the released code's uniform draw.

    Decoder-only models: X is what stands between soft prompt and target, up to its s-th token.

    The artifact: `prompt` (m, d), `A` (s, rank), `B` (rank, d); float32.
    """

    artifact = True

    def __init__(self, options: DeptOptions, given: Given) -> None:
        super().__init__()
        P_init, m = given.initialization, options.prompt_tokens
        if m > len(P_init):
            raise OptionsError(f"prompt_tokens is {m}, but the initialization has {len(P_init)} rows")
        self.options = options
        self.P_s = nn.Parameter(P_init[:m].clone())
        A = P_init.new_empty(options.max_source_tokens, options.rank, device="cpu")
        nn.init.kaiming_normal_(A, math.sqrt(5), generator=torch.Generator().manual_seed(given.seed))
        self.A = nn.Parameter(A.to(P_init))
        self.B = nn.Parameter(P_init.new_zeros(options.rank, P_init.shape[1]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        return [
            {"params": [self.P_s], "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {"params": [self.A, self.B], "lr": options.update_learning_rate, "weight_decay": options.weight_decay},
        ]

    def prompt(self) -> Prompt:
        return partial(decomposed, self._tensors())

    def snapshot(self) -> Snapshot:
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return Snapshot(prompt=partial(decomposed, tensors), tensors=tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {"prompt": self.P_s, "A": self.A, "B": self.B}


def decomposed(tensors: Mapping[str, Tensor], reading: Reading) -> tuple[Tensor, Tensor]:
    """P_s and X + A B; `tensors` as in the artifact."""
    X = reading.embeddings
    update = tensors["A"][: X.shape[1]] @ tensors["B"]  # (at most s, d)
    return tensors["prompt"], X + pad(update, (0, 0, 0, X.shape[1] - len(update)))
