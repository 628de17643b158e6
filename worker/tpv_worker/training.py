"""The one training loop of all methods, in the order in which it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tpv.methods import TrainingOptions
from tpv_worker import memory, parallel
from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.checkpoints import Checkpoints, State, load_optimizer, optimizer_tensors
from tpv_worker.data import Example, Task, batches
from tpv_worker.errors import DataError, OutOfMemory, TrainingDiverged
from tpv_worker.evaluation import evaluate

if TYPE_CHECKING:  # methods may import this module: some train before they are trained
    from tpv_worker.methods.protocol import Report, Snapshot, TuningMethod

LOG_EVERY = 10  #: steps between two looks at the losses; in between nothing waits for the device
SMOOTHING = 0.9  #: weight of the past in the running mean of the training loss
NO_CHECKPOINTS = Checkpoints()


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
    wall_seconds: float  #: without what was done again after a checkpoint
    cpu_seconds: float  #: the same, of all threads and processes


class Course(BaseModel):
    """What a run has come to after a step, beside tensors."""

    accumulation: int  #: parts of a batch
    step: int = 0  #: counted from 1; 0: before the first one
    running: float | None = None  #: mean of the training loss
    members: tuple[int, ...] | None = None  #: of the group, in the last step
    groups: list[tuple[int, tuple[int, ...]]] = []
    validations: list[tuple[int, float]] = []
    misses: int = 0  #: validations since the best one
    best_step: int = 0
    best_value: float | None = None
    best_members: tuple[int, ...] | None = None
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def group_event(self, step: int) -> dict[str, Any]:
        return {"type": "group", "step": step, "members": list(self.members or ()), "changes": len(self.groups) - 1}


def train(
    backbone: Backbone,
    method: TuningMethod,
    tasks: Sequence[Task],
    source_tasks: Sequence[Task] = (),
    *,
    options: TrainingOptions,
    seed: int,
    report: Report = lambda event: None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> TrainingResult:
    """Trains a method on the tasks together and keeps the step with the best validation, the first one on ties.

    The method is prepared first, with the source tasks. A batch mixes the tasks' rows in proportion to their numbers,
    each counting at most `mixing_limit` where the options have one; validation is the mean over the tasks that have
    validation rows. Without any (few-shot) the last step is kept. With no steps the prepared method is the result. A
    method whose result is an artifact is left as it was at its best step.

    On a CPU the same arguments give the same bytes; the global random state is neither read nor changed. The training
    loss is looked at every LOG_EVERY steps and before each validation: that is when it is reported, when `stop_below`
    ends the run, and when a NaN is found. Nothing else waits for the device, but a method that decides on the host.

    The rows that the method samples of a batch are computed in `accumulation` parts, whose losses are weighted by their
    target tokens: the result is that of all of them. When memory runs out there are twice as many parts from then on,
    down to one row each. Processes that train together (`tpv_worker.parallel`) share the rows in the same way.

    After a step `checkpoints` may ask for the run's state. A run that goes on from one does what the run that wrote it
    would have done, on a CPU to the bit; its method is told so by `resume`, in the place of `prepare`.

    `report` gets {"type": "progress", step, steps, loss, learning_rate}, {"type": "group", step, members,
    changes} and {"type": "evaluation", step, metric, value}; what it raises ends the run.
    Raises DataError and OptionsError before the first step, TrainingDiverged and OutOfMemory during the run.
    """
    clock, cpu_clock = time.perf_counter(), time.process_time()
    if not tasks:
        raise DataError("there is no task to train on")
    rows = backbone.num_virtual_tokens(method.snapshot().prompt)
    examples, validation = [], []
    for place, task in enumerate(tasks):
        backbone.label_tokens(task.label_words or (), options)  # looked at now, needed at the first validation
        examples += backbone.tokenize(task.train, options, rows, place)
        if judged := task.validation[: options.evaluate_rows]:
            validation.append((task, backbone.tokenize(judged, options, rows, place)))
    found = checkpoints.found
    if found is not None and found.step > method.steps_before:
        method.resume(found.values["method"], report)
    else:
        found = None  # or it is one of the preparation's
        method.prepare(tasks, source_tasks, report, checkpoints)

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

    run, best = Course(accumulation=options.accumulation), None
    if found is not None:
        run, best = load_state(found, method, optimizer)
        clock -= run.wall_seconds
        if parallel.rank_and_size()[0] == 0:
            cpu_clock -= run.cpu_seconds
        if run.members is not None:
            report(run.group_event(run.step))
    recent: list[Tensor] = []  # losses since the last look at them, on the device

    def cpu_seconds() -> float:
        return math.fsum(parallel.gathered(time.process_time() - cpu_clock))

    def look() -> None:
        """Takes the recent losses into the running mean; raises TrainingDiverged for the first that is no number."""
        for step, loss in enumerate(parallel.summed(torch.stack(recent)).tolist(), run.step + 1 - len(recent)):
            if not math.isfinite(loss):
                raise TrainingDiverged(step, "loss")
            run.running = loss if run.running is None else SMOOTHING * run.running + (1 - SMOOTHING) * loss
        recent.clear()

    def judge() -> None:
        """Keeps the method's present answer if it is the best one so far."""
        nonlocal best
        candidate = method.snapshot()
        if not all(tensor.isfinite().all() for tensor in tensors_of(candidate)):
            raise TrainingDiverged(run.step, "soft prompt")
        value = math.inf  # without validation rows the last step is the only candidate
        if validation:
            value = fmean(
                evaluate(backbone, candidate.prompt, rows, label_words=task.label_words, options=options).value
                for task, rows in validation
            )
            run.validations.append((run.step, value))
            report({"type": "evaluation", "step": run.step, "metric": "accuracy", "value": value})
        if run.best_value is None or value > run.best_value:
            best = candidate
            run.best_step, run.best_value, run.best_members, run.misses = run.step, value, candidate.members, 0
        else:
            run.misses += 1

    if options.steps == 0:
        judge()
    for step, chosen in enumerate(islice(order, run.step, options.steps), run.step + 1):
        run.step = step
        slowed = rate(step, options)
        for group, full_rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = slowed * full_rate

        prompt, batch, loss = method.prompt(), method.sample([examples[i] for i in chosen]), None
        while loss is None:
            try:
                loss = backward(backbone, method, prompt, batch, run.accumulation)
            except Exception as error:
                if not memory.has_run_out(error):
                    raise
                if run.accumulation * parallel.rank_and_size()[1] >= len(batch):
                    raise OutOfMemory(step, max(len(row.source) + len(row.target) for row in batch)) from error
            if loss is None:  # what the failed try held is free only now that its error is gone
                optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                run.accumulation = min(2 * run.accumulation, len(batch))
                message = f"out of memory: from now on a batch is computed in {run.accumulation} parts"
                report({"type": "warning", "step": step, "message": message})
        parallel.sum_gradients(parameters)
        if options.clip_norm is not None:
            clip_grad_norm_(parameters, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # None, not zero: AdamW then leaves an unused parameter alone

        recent.append(loss)
        if method.members is not None and method.members != run.members:
            run.members = method.members
            run.groups.append((step, run.members))
            report(run.group_event(step))

        last = step == options.steps
        due = last or step % options.evaluate_every == 0
        if due or step % LOG_EVERY == 0:
            look()
            report(
                {
                    "type": "progress",
                    "step": step,
                    "steps": options.steps,
                    "loss": run.running,
                    "learning_rate": slowed * full_rates[0],
                }
            )
            if options.stop_below is not None and run.running is not None:
                last = last or run.running < options.stop_below

        if last or (due and validation):
            judge()
        if last or run.misses == options.patience:
            break

        if parallel.of_first(checkpoints.due()):
            if recent:
                look()  # what is kept has no NaN behind it; what is reported, and when, stays as it is
            run.wall_seconds, run.cpu_seconds = time.perf_counter() - clock, cpu_seconds()
            checkpoints.save(state_of(run, best, method, optimizer))

    assert best is not None  # the last step is judged, if not before
    if method.artifact:
        method.load(best.tensors)
    return TrainingResult(
        snapshot=on_cpu(best),
        best_step=run.best_step,
        best_value=run.best_value if validation else None,
        steps=run.step,
        validations=run.validations,
        groups=run.groups,
        loss=run.running,
        wall_seconds=time.perf_counter() - clock,
        cpu_seconds=cpu_seconds(),
    )


def backward(
    backbone: Backbone, method: TuningMethod, prompt: Prompt, batch: Sequence[Example], accumulation: int
) -> Tensor:
    """The loss of a batch that is computed in parts, a scalar; its gradients are in the parameters then."""
    shares = parallel.shares(batch, accumulation)
    losses = []
    for part, share in shares:
        loss = share * method.loss(backbone, prompt, part)
        # The parts have the prompt's own graph in common; the model's is gone with the loss.
        loss.backward(retain_graph=len(shares) > 1)  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def state_of(run: Course, best: Snapshot | None, method: TuningMethod, optimizer: torch.optim.Optimizer) -> State:
    """What `load_state` needs to go on after this step."""
    tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    if best is not None:
        tensors |= {f"best/{name}": tensor for name, tensor in best.tensors.items()}
        if not callable(best.prompt):
            tensors["prompt"] = best.prompt
    return State(
        step=method.steps_before + run.step,
        tensors=tensors,
        values={"course": run.model_dump(), "method": method.state()},
    )


def load_state(state: State, method: TuningMethod, optimizer: torch.optim.Optimizer) -> tuple[Course, Snapshot | None]:
    """Where the run was and its best answer so far; brings the method's parameters and the optimizer there too."""
    run, best = Course.model_validate(state.values["course"]), None
    if run.best_value is not None:
        device = optimizer.param_groups[0]["params"][0].device
        tensors = {name: tensor.to(device) for name, tensor in part_of(state.tensors, "best").items()}
        if method.artifact:
            method.load(tensors)
        best = method.snapshot()
        if "prompt" in state.tensors:
            best = replace(best, prompt=state.tensors["prompt"].to(device), members=run.best_members, tensors=tensors)
    load_optimizer(optimizer, part_of(state.tensors, "optimizer"))
    return run, best


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}


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
