"""The one training loop of all methods, in the order in which it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tpv.methods import TrainingOptions
from tpv_worker import parallel
from tpv_worker.backbone import Backbone
from tpv_worker.data import Task, batches
from tpv_worker.errors import DataError, TrainingDiverged
from tpv_worker.evaluation import evaluate

if TYPE_CHECKING:  # methods may import this module: some train before they are trained
    from tpv_worker.methods.protocol import Report, Snapshot, TuningMethod

LOG_EVERY = 10  #: steps between two looks at the losses; in between nothing waits for the device
SMOOTHING = 0.9  #: weight of the past in the running mean of the training loss


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run gives: the method's answer at its best step, and how it came about."""

    snapshot: Snapshot  #: of the best step, tensors on the CPU
    best_step: int  #: counted from 1; 0: before the first one
    best_value: float | None  #: metric on the validation rows, mean of the tasks; none without such rows
    steps: int  #: run in all
    validations: list[tuple[int, float]]  #: (step, value)
    groups: list[tuple[int, tuple[int, ...]]]  #: (step, members), changes only
    loss: float | None  #: running mean of the training loss at the last step, nats a token; none without steps
    wall_seconds: float
    cpu_seconds: float  #: of this process, all threads


def train(
    backbone: Backbone,
    method: TuningMethod,
    tasks: Sequence[Task],
    source_tasks: Sequence[Task] = (),
    *,
    options: TrainingOptions,
    seed: int,
    report: Report = lambda event: None,
) -> TrainingResult:
    """Trains a method on the tasks together and keeps the step with the best validation, the first one on ties.

    The method is prepared first, with the source tasks. A batch mixes the tasks' rows in proportion to their numbers,
    each counting at most `mixing_limit` where the options have one; validation is the mean over the tasks that have
    validation rows. Without any (few-shot) the last step is kept. With no steps the prepared method is the result. A
    method whose result is an artifact is left as it was at its best step.

    On a CPU the same arguments give the same bytes; the global random state is neither read nor changed. The training
    loss is looked at every LOG_EVERY steps and before each validation: that is when it is reported, when `stop_below`
    ends the run, and when a NaN is found. Nothing else waits for the device.

    A batch is computed in `accumulation` parts, whose losses are weighted by their target tokens: the result is that of
    the whole batch. Processes that train together (`tpv_worker.parallel`) share each batch in the same way.

    `report` gets {"type": "progress", step, steps, loss, learning_rate}, {"type": "group", step, members} and
    {"type": "evaluation", step, metric, value}; what it raises ends the run.
    Raises DataError and OptionsError before the first step, TrainingDiverged during the run.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    if not tasks:
        raise DataError("there is no task to train on")
    rows = backbone.num_virtual_tokens(method.snapshot().prompt)
    examples, validation = [], []
    for place, task in enumerate(tasks):
        backbone.label_tokens(task.label_words or (), options)  # looked at now, needed at the first validation
        examples += backbone.tokenize(task.train, options, rows, place)
        if judged := task.validation[: options.evaluate_rows]:
            validation.append((task, backbone.tokenize(judged, options, rows, place)))
    method.prepare(tasks, source_tasks, report)

    if options.compile:
        backbone.compile()

    groups = method.parameter_groups()
    optimizer = torch.optim.AdamW(groups, betas=options.adam_betas, eps=options.adam_epsilon)
    parameters = [parameter for group in groups for parameter in group["params"]]
    full_rates = [group["lr"] for group in groups]
    order = batches(
        [len(example.source) for example in examples],
        options.batch_size,
        seed,
        sizes=[len(task.train) for task in tasks],
        limit=getattr(options, "mixing_limit", None),
    )

    recent: list[Tensor] = []  # losses since the last look at them, on the device
    running: float | None = None
    members: tuple[int, ...] | None = None
    group_history: list[tuple[int, tuple[int, ...]]] = []
    validations: list[tuple[int, float]] = []
    best: Snapshot | None = None
    best_step, best_value = 0, -math.inf
    misses = 0  # validations since the best one

    def judge(step: int) -> None:
        """Keeps the method's present answer if it is the best one so far."""
        nonlocal best, best_step, best_value, misses
        candidate = method.snapshot()
        if not all(tensor.isfinite().all() for tensor in tensors_of(candidate)):
            raise TrainingDiverged(step, "soft prompt")
        value = math.inf  # without validation rows the last step is the only candidate
        if validation:
            value = fmean(
                evaluate(backbone, candidate.prompt, rows, label_words=task.label_words, options=options).value
                for task, rows in validation
            )
            validations.append((step, value))
            report({"type": "evaluation", "step": step, "metric": "accuracy", "value": value})
        if value > best_value:
            best, best_step, best_value, misses = candidate, step, value, 0
        else:
            misses += 1

    step = 0
    if options.steps == 0:
        judge(step)
    for step in range(1, options.steps + 1):
        slowed = rate(step, options)
        for group, full_rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = slowed * full_rate

        prompt = method.prompt()
        shares = parallel.shares([examples[i] for i in next(order)], options.accumulation)
        losses = []
        for part, share in shares:
            loss = share * method.loss(backbone, prompt, part)
            # The parts have the prompt's own graph in common; the model's is gone with the loss.
            loss.backward(retain_graph=len(shares) > 1)  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        parallel.sum_gradients(parameters)
        if options.clip_norm is not None:
            clip_grad_norm_(parameters, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # None, not zero: AdamW then leaves an unused parameter alone

        recent.append(torch.stack(losses).sum())
        if method.members is not None and method.members != members:
            members = method.members
            group_history.append((step, members))
            report({"type": "group", "step": step, "members": list(members)})

        last = step == options.steps
        due = last or step % options.evaluate_every == 0
        if due or step % LOG_EVERY == 0:
            for past, value in enumerate(parallel.summed(torch.stack(recent)).tolist(), step + 1 - len(recent)):
                if not math.isfinite(value):
                    raise TrainingDiverged(past, "loss")
                running = value if running is None else SMOOTHING * running + (1 - SMOOTHING) * value
            recent.clear()
            report(
                {
                    "type": "progress",
                    "step": step,
                    "steps": options.steps,
                    "loss": running,
                    "learning_rate": slowed * full_rates[0],
                }
            )
            last = last or (options.stop_below is not None and running is not None and running < options.stop_below)

        if last or (due and validation):
            judge(step)
        if last or misses == options.patience:
            break

    assert best is not None  # the last step is judged, if not before
    if method.artifact:
        method.load(best.tensors)
    return TrainingResult(
        snapshot=on_cpu(best),
        best_step=best_step,
        best_value=best_value if validation else None,
        steps=step,
        validations=validations,
        groups=group_history,
        loss=running,
        wall_seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


def tensors_of(snapshot: Snapshot) -> list[Tensor]:
    prompt = [] if callable(snapshot.prompt) else [snapshot.prompt]
    return [*prompt, *snapshot.tensors.values()]


def on_cpu(snapshot: Snapshot) -> Snapshot:
    """The snapshot with its tensors on the CPU; a prompt that is a function stays where it is."""
    return replace(
        snapshot,
        prompt=snapshot.prompt if callable(snapshot.prompt) else snapshot.prompt.cpu(),
        tensors={name: tensor.cpu() for name, tensor in snapshot.tensors.items()},
    )


def rate(step: int, options: TrainingOptions) -> float:
    """Share of the full learning rate at a step counted from 1: linear warm-up, then constant or down towards zero."""
    if step <= options.warmup_steps:
        return step / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return 1.0
    left = (options.steps + 1 - step) / (options.steps - options.warmup_steps)  # 1 at first, just above 0 at last
    return left if options.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
