"""Multitask prompt tuning: one shared prompt, made from the sources' tasks and prompts, and a rank-one factor a task.

Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning,
https://arxiv.org/abs/2303.02861. The prompt of a task k is (Eq. 2, o being the Hadamard product)

    P_k = P* o W_k,  W_k = u_k v_k^T

Source stage: P* and the u_k, v_k of all sources are trained together, with each source's own prompt P_init + T_k as the
teacher of P_k (Eq. 3 to 5):

    L_Total = L_PLM + lambda * (L_Logits + L_Hidden)
    L_Logits = KL[P(y | x; teacher) || P(y | x; P_k)]
    L_Hidden = (H - H_teacher)^2

Target stage: P* o (u v^T) is trained by the target's loss L_PLM alone, from the shared P* and the averages of the u_k
and v_k, with one learning rate for P* and another for u and v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.random import PCG64, Generator
from torch import Tensor, nn
from torch.nn.functional import kl_div

from tpv.methods import MptOptions
from tpv_worker.backbone import IGNORED, Backbone, Predictions, Prompt
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Example, Task
from tpv_worker.errors import OptionsError, TrainingDiverged
from tpv_worker.methods.protocol import Given, Report, Snapshot, TuningMethod
from tpv_worker.training import train


class Mpt(TuningMethod):
    """Trains P* (r, d), u (r,) and v (d,) on the target: r * d + r + d parameters; the result is one vector.

    Snapshots keep `shared` P*, `u` and `v` beside it. With `source_steps` 0 there is no source stage: P* is P_init.
    """

    def __init__(self, options: MptOptions, given: Given) -> None:
        super().__init__()
        assert given.sources is not None
        self.options, self.given = options, given
        self.steps_before = options.source_steps
        self.teachers = given.initialization + given.sources  # (n, r, d)
        self.P = nn.Parameter(given.initialization.clone())
        self.u = nn.Parameter(torch.ones_like(self.P[:, 0]))
        self.v = nn.Parameter(torch.ones_like(self.P[0]))

    def prepare(
        self, tasks: Sequence[Task], source_tasks: Sequence[Task], report: Report, checkpoints: Checkpoints
    ) -> None:
        """The source stage, by the same loop; its last step counts. Its reports have the key `stage`.

        Raises OptionsError for a source without a data set, TrainingDiverged with a step of this stage.
        """
        if len(source_tasks) != len(self.teachers):
            raise OptionsError(f"{len(self.teachers)} sources need a data set each; there are {len(source_tasks)}")
        options = self.options
        if options.source_steps:
            sources = SourceStage(options, self.given.initialization, self.teachers, self.given.seed)
            try:
                result = train(
                    self.given.backbone,
                    sources,
                    [replace(task, validation=()) for task in source_tasks],
                    options=options.model_copy(update={"steps": options.source_steps, "stop_below": None}),
                    seed=self.given.seed,
                    report=lambda event: report({**event, "stage": "sources"}),
                    checkpoints=checkpoints,
                )
            except TrainingDiverged as error:  # its step is none of the target's
                raise TrainingDiverged(error.step, "source stage's loss or prompt") from error
            with torch.no_grad():
                self.P.copy_(sources.P)
                self.u.copy_(sources.u.mean(dim=0))
                self.v.copy_(sources.v.mean(dim=0))
            self.facts = {"source_loss": result.loss}

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        return [
            {"params": [self.P], "lr": options.learning_rate, "weight_decay": options.weight_decay},
            {"params": [self.u, self.v], "lr": options.task_learning_rate, "weight_decay": options.weight_decay},
        ]

    def prompt(self) -> Tensor:
        return self.P * torch.outer(self.u, self.v)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        tensors = {"shared": self.P, "u": self.u, "v": self.v}
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return Snapshot(prompt=self.prompt(), tensors=copies)


class SourceStage(TuningMethod):
    """Trains P* (r, d), and u_k (n, r) and v_k (n, d) of all sources together, all at one rate as the paper's.

    P* starts from P_init and u_k, v_k from ones, so that every P_k starts from P_init, words of the vocabulary: the
    paper's start for student prompts. Batches mix the sources in proportion to their rows; of the sources in a batch,
    K are kept, K drawn from 2 up to all of them (the paper's stochastic task sampling).

    Where the paper leaves it open: the softmax temperature of L_Logits is 1, H are the last hidden states (of encoder
    and decoder), soft prompt included, and all three losses are means over the targets' tokens. L_Hidden of a row is
    the mean over its states and their entries, and weighs as many as the row's target has tokens.
    """

    def __init__(self, options: MptOptions, initialization: Tensor, teachers: Tensor, seed: int) -> None:
        super().__init__()
        self.options, self.teachers = options, teachers
        self.random = Generator(PCG64(seed))
        self.P = nn.Parameter(initialization.clone())
        self.u = nn.Parameter(torch.ones_like(teachers[:, :, 0]))
        self.v = nn.Parameter(torch.ones_like(teachers[:, 0]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        params = [self.P, self.u, self.v]
        return [{"params": params, "lr": options.learning_rate, "weight_decay": options.weight_decay}]

    def students(self) -> Tensor:
        """P_k of all sources, (n, r, d)."""
        return self.P * self.u[:, :, None] * self.v[:, None, :]

    def prompt(self) -> Prompt:
        return _by_task(self.students())

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        return Snapshot(prompt=self.prompt(), tensors={"students": self.students()})

    def state(self) -> dict[str, Any]:
        return {"random": self.random.bit_generator.state}

    def resume(self, state: Mapping[str, Any], report: Report) -> None:
        self.random.bit_generator.state = state["random"]

    def sample(self, batch: Sequence[Example]) -> Sequence[Example]:
        """Those of some of the tasks in the batch."""
        present = sorted({example.task for example in batch})
        if len(present) <= 2:
            return batch
        kept = self.random.choice(present, self.random.integers(2, len(present), endpoint=True), replace=False)
        return [example for example in batch if example.task in kept]

    def loss(self, backbone: Backbone, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
        """Eq. 5."""
        if not self.options.distillation:
            return backbone.loss(prompt, batch)
        with torch.no_grad():
            teacher = backbone.predictions(_by_task(self.teachers), batch, hidden=True)
        student = backbone.predictions(prompt, batch, hidden=True)
        return student.cross_entropy() + self.options.distillation * difference(student, teacher)


def _by_task(prompts: Tensor) -> Prompt:
    """Each example reads the prompt of its task; `prompts` (tasks, r, d)."""
    return lambda reading: (prompts[reading.tasks], reading.embeddings)


def difference(student: Predictions, teacher: Predictions) -> Tensor:
    """L_Logits + L_Hidden, Eq. 3 and 4, in nats and in squared units of the hidden states: a scalar."""
    written = student.labels != IGNORED  # (batch, tokens)
    from_logits = kl_div(
        student.logits.log_softmax(dim=2), teacher.logits.log_softmax(dim=2), reduction="none", log_target=True
    )
    of_rows = _sums(from_logits.sum(dim=2), written)  # (batch,)
    for (ours, mask), (theirs, _) in zip(student.hidden, teacher.hidden, strict=True):
        distances = (ours.float() - theirs.float()).square().mean(dim=2)
        of_rows = of_rows + written.sum(dim=1) * _sums(distances, mask) / mask.sum(dim=1)
    return of_rows.sum() / written.sum()


def _sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sums (batch,) of the values (batch, length) that the mask holds; without a boolean index, which would wait."""
    return (values * mask).sum(dim=1)
