"""The one training loop of all methods, in the order in which it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tpv.methods import TrainingOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, batches
from tpv_worker.errors import TrainingDiverged
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import TuningMethod

LOG_EVERY = 10  #: steps between two looks at the losses; in between nothing waits for the device
SMOOTHING = 0.9  #: weight of the past in the running mean of the training loss

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run gives: the soft prompt of its best step, and how it came about."""

    prompt: Tensor  #: P* (r, d), float32, on the CPU
    tensors: Mapping[str, Tensor]  #: what the method keeps beside it, on the CPU
    members: tuple[int, ...] | None  #: the group of the best step, for methods that group
    best_step: int  #: counted from 1
    best_value: float | None  #: metric on the validation rows; none without such rows
    steps: int  #: run in all
    validations: list[tuple[int, float]]  #: (step, value)
    groups: list[tuple[int, tuple[int, ...]]]  #: (step, members), changes only
    loss: float  #: running mean of the training loss at the last step, nats a token
    wall_seconds: float
    cpu_seconds: float  #: of this process, all threads


def train(
    backbone: Backbone,
    method: TuningMethod,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row] = (),
    *,
    label_words: Sequence[str] | None,
    options: TrainingOptions,
    seed: int,
    report: Report = lambda event: None,
) -> TrainingResult:
    """Trains a method's parameters on the rows and keeps the step with the best validation metric, the first on ties.

    Without validation rows (few-shot) the last step is kept. On a CPU the same arguments give the same bytes; the
    global random state is neither read nor changed. The training loss is looked at every LOG_EVERY steps and before
    each validation: that is when it is reported, when `stop_below` ends the run, and when a NaN is found.

    `report` gets {"type": "progress", step, steps, loss, learning_rate}, {"type": "group", step, members} and
    {"type": "evaluation", step, metric, value}; what it raises ends the run.
    Raises DataError and OptionsError before the first step, TrainingDiverged during the run.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    best, best_step, best_value = method.snapshot(), 0, -math.inf
    rows = len(best.prompt)
    examples = backbone.tokenize(train_rows, options, rows)
    judged = validation_rows[: options.evaluate_rows]
    validation = backbone.tokenize(judged, options, rows) if judged else []

    groups = method.parameter_groups()
    optimizer = torch.optim.AdamW(groups, betas=options.adam_betas, eps=options.adam_epsilon)
    parameters = [parameter for group in groups for parameter in group["params"]]
    full_rates = [group["lr"] for group in groups]
    order = batches([len(example.source) for example in examples], options.batch_size, seed)

    recent: list[Tensor] = []  # losses since the last look at them, on the device
    running = math.nan
    members: tuple[int, ...] | None = None
    group_history: list[tuple[int, tuple[int, ...]]] = []
    validations: list[tuple[int, float]] = []

    for step in range(1, options.steps + 1):
        share = rate(step, options)
        for group, full_rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = share * full_rate

        loss = backbone.loss(method.prompt(), [examples[i] for i in next(order)])
        loss.backward()  # type: ignore[no-untyped-call]
        if options.clip_norm is not None:
            clip_grad_norm_(parameters, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # None, not zero: AdamW then leaves an unused parameter alone

        recent.append(loss.detach())
        if method.members is not None and method.members != members:
            members = method.members
            group_history.append((step, members))
            report({"type": "group", "step": step, "members": list(members)})

        last = step == options.steps
        due = last or step % options.evaluate_every == 0
        if due or step % LOG_EVERY == 0:
            for past, value in enumerate(torch.stack(recent).tolist(), step + 1 - len(recent)):
                if not math.isfinite(value):
                    raise TrainingDiverged(past, "loss")
                running = value if math.isnan(running) else SMOOTHING * running + (1 - SMOOTHING) * value
            recent.clear()
            report(
                {
                    "type": "progress",
                    "step": step,
                    "steps": options.steps,
                    "loss": running,
                    "learning_rate": share * full_rates[0],
                }
            )
            last = last or (options.stop_below is not None and running < options.stop_below)

        if last or (due and validation):
            candidate = method.snapshot()
            if not candidate.prompt.isfinite().all():
                raise TrainingDiverged(step, "soft prompt")
            value = math.inf  # without validation rows the last step is the only candidate
            if validation:
                value = evaluate(backbone, candidate.prompt, validation, label_words=label_words, options=options).value
                validations.append((step, value))
                report({"type": "evaluation", "step": step, "metric": "accuracy", "value": value})
            if value > best_value:
                best, best_step, best_value = candidate, step, value
        if last:
            break

    return TrainingResult(
        prompt=best.prompt.cpu(),
        tensors={name: tensor.cpu() for name, tensor in best.tensors.items()},
        members=best.members,
        best_step=best_step,
        best_value=best_value if validation else None,
        steps=step,
        validations=validations,
        groups=group_history,
        loss=running,
        wall_seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def rate(step: int, options: TrainingOptions) -> float:
    """Share of the full learning rate at a step counted from 1: linear warm-up, then constant or linear to zero."""
    if step <= options.warmup_steps:
        return step / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return 1.0
    return (options.steps + 1 - step) / (options.steps - options.warmup_steps)
