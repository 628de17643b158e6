from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tpv.files import fingerprint
from tpv.methods import DtvgOptions, MptOptions, PromptTuningOptions, TpvSumOptions, TrainingOptions
from tpv_worker.backbone import Backbone, Prompt, Reading
from tpv_worker.data import Example, Row, Task
from tpv_worker.errors import DataError, OptionsError, OutOfMemory, TrainingDiverged
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import Dtvg, Given, PromptTuning, Snapshot, TuningMethod
from tpv_worker.methods.mpt import SourceStage
from tpv_worker.training import LOG_EVERY, TrainingResult, rate, tensors_of, train

aten = torch.ops.aten

OPTIONS: dict[str, Any] = {"steps": 30, "batch_size": 8, "learning_rate": 0.1, "evaluate_every": 10, "separator": "|"}


Make = Callable[..., PromptTuning | Dtvg | SourceStage]


def prompt_tuning(backbone: Backbone, initialization: Tensor, **options: Any) -> PromptTuning:
    given = Given(backbone=backbone, initialization=initialization)
    return PromptTuning(PromptTuningOptions(**{**OPTIONS, **options}), given)


def dtvg(backbone: Backbone, initialization: Tensor, **options: Any) -> Dtvg:
    target, *sources = 0.3 * torch.randn(4, *initialization.shape, generator=torch.Generator().manual_seed(3))
    given = Given(backbone=backbone, initialization=initialization, target=target, sources=torch.stack(sources))
    return Dtvg(DtvgOptions(**{**OPTIONS, "source_scale_learning_rate": 0.1, **options}), given)


def source_stage(backbone: Backbone, initialization: Tensor, **options: Any) -> SourceStage:
    """Of four tasks."""
    teachers = initialization + 0.3 * torch.randn(4, *initialization.shape, generator=torch.Generator().manual_seed(3))
    return SourceStage(MptOptions(**{**OPTIONS, **options}), initialization, teachers, seed=0)


def run(
    backbone: Backbone,
    method: PromptTuning | Dtvg | SourceStage,
    rows: list[Row],
    validation: list[Row],
    seed: int = 0,
    **more: Any,
) -> TrainingResult:
    task = Task(train=rows, validation=validation, label_words=("yes", "no"))
    return train(backbone, method, [task], options=method.options, seed=seed, **more)


def prompt_of(result: TrainingResult) -> Tensor:
    assert isinstance(result.snapshot.prompt, Tensor)
    return result.snapshot.prompt


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_loss_falls_and_the_frozen_weights_stay(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Make
) -> None:
    weights = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    losses: list[float] = []
    method = make(backbone, prompt, steps=60, learning_rate=0.5, schedule="constant")
    result = run(backbone, method, rows, rows, report=lambda event: losses.append(event.get("loss", np.nan)))
    losses = [loss for loss in losses if not np.isnan(loss)]
    assert losses[-1] < 0.9 * losses[0]
    assert result.loss == losses[-1]
    after = backbone.model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(weight.grad is None for weight in backbone.model.parameters())


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_same_seed_gives_the_same_bytes(backbone: Backbone, prompt: Tensor, rows: list[Row], make: Make) -> None:
    first, second, other = (run(backbone, make(backbone, prompt), rows, [], seed) for seed in (5, 5, 6))
    assert fingerprint(prompt_of(first).numpy()) == fingerprint(prompt_of(second).numpy())
    assert fingerprint(prompt_of(first).numpy()) != fingerprint(prompt_of(other).numpy())
    assert first.snapshot.tensors.keys() == second.snapshot.tensors.keys()
    assert all(
        torch.equal(first.snapshot.tensors[name], second.snapshot.tensors[name]) for name in first.snapshot.tensors
    )
    assert first.groups == second.groups


def test_the_global_random_state_is_left_alone(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(backbone, dtvg(backbone, prompt), rows, rows)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_best_step_is_kept_the_first_on_ties(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Make
) -> None:
    method = make(backbone, prompt, steps=33, evaluate_every=3, schedule="constant")
    result = run(backbone, method, rows, rows[:10])
    steps, values = zip(*result.validations, strict=True)
    assert steps == (*range(3, 33, 3), 33)
    assert result.best_value == max(values)
    assert result.best_step == steps[values.index(max(values))]
    assert result.steps == 33
    examples = backbone.tokenize(rows[:10], method.options, len(prompt))
    again = evaluate(backbone, prompt_of(result), examples, label_words=("yes", "no"), options=method.options)
    assert again.value == result.best_value
    shorter = run(backbone, make(backbone, prompt, schedule="constant", steps=result.best_step), rows, [])
    assert torch.equal(prompt_of(shorter), prompt_of(result)), "no later step may have changed it"


def test_without_validation_rows_the_last_step_is_kept(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method = prompt_tuning(backbone, prompt)
    result = run(backbone, method, rows, [])
    assert (result.best_step, result.best_value, result.validations) == (30, None, [])
    assert torch.equal(prompt_of(result), method.P.detach())


def test_validation_looks_at_the_first_rows_only(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    result = run(backbone, prompt_tuning(backbone, prompt, evaluate_rows=1), rows, rows)
    assert {value for _, value in result.validations} <= {0.0, 1.0}


def test_training_stops_when_the_running_loss_is_low(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    events: list[dict[str, Any]] = []
    result = run(
        backbone, prompt_tuning(backbone, prompt, stop_below=100, evaluate_every=50), rows, rows, report=events.append
    )
    assert result.steps == LOG_EVERY
    assert result.validations[-1][0] == result.best_step == LOG_EVERY
    assert [event["type"] for event in events] == ["progress", "evaluation"]


def test_training_stops_when_validation_gets_no_better(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method = prompt_tuning(backbone, prompt, steps=90, evaluate_every=3, patience=4, schedule="constant")
    result = run(backbone, method, rows, rows[:6])
    best = [value for _, value in result.validations].index(result.best_value)
    assert len(result.validations) == best + 1 + 4
    assert result.steps == result.best_step + 4 * 3 < 90


@pytest.mark.parametrize("make", [prompt_tuning, dtvg, source_stage])
def test_a_batch_in_parts_is_the_whole_batch(backbone: Backbone, prompt: Tensor, rows: list[Row], make: Make) -> None:
    """Targets of different lengths: a mean of the parts' means would be another number."""
    mixed = [Row(row.source, " ".join(["w9"] * (1 + i % 5))) for i, row in enumerate(rows)]
    tasks = [Task(train=mixed[i::4], label_words=None) for i in range(4)]
    results = []
    for parts in (1, 3, 20):  # the last one: more parts than rows
        method = make(backbone, prompt, accumulation=parts, steps=5, learning_rate=0.01)
        results.append(train(backbone, method, tasks, options=method.options, seed=0))
    whole, *others = results
    for other in others:
        assert other.loss == pytest.approx(whole.loss, rel=1e-5)
        assert other.groups == whole.groups
        for one, another in zip(tensors_of(whole.snapshot), tensors_of(other.snapshot), strict=True):
            torch.testing.assert_close(another, one, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer's own look at all of it
def test_a_compiled_model_trains_as_the_model_itself(
    model_paths: dict[str, Path], backbone: Backbone, prompt: Tensor, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by torch.compile, but not made into C++, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    few = {"steps": 3, "learning_rate": 0.01}
    plain = run(backbone, prompt_tuning(backbone, prompt, **few), rows, [])
    other = Backbone.load(model_paths[backbone.kind])
    compiled = run(other, prompt_tuning(other, prompt, compile=True, **few), rows, [])
    assert counters["frames"]["ok"] > 0, "something has to be compiled"
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    torch.testing.assert_close(prompt_of(compiled), prompt_of(plain), rtol=0, atol=1e-4)


class Reads(TorchDispatchMode):
    """Keeps the tensors whose values the host asks for, by the step that it does so in; 0: before the first one."""

    ASKS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 0, list[tuple[int, Tensor]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket is aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if by_mask or function.overloadpacket in self.ASKS:
            self.found.append((self.step, args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [prompt_tuning, partial(dtvg, grouping="fixed-group")], ids=["prompt-tuning", "dtvg"])
def test_the_host_waits_for_the_device_only_where_it_looks_at_the_losses(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each of these questions is a wait. AdamW's own counters of steps are on the host everywhere."""
    reads, own = Reads(), list[Tensor]()
    method = make(backbone, prompt, steps=25, clip_norm=1.0)
    of_the_next_step = method.prompt

    def prompt_of_the_next_step() -> Prompt:
        made = of_the_next_step()
        reads.step += 1
        return made

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own[:] = [state["step"] for state in optimizer.state.values()]

    monkeypatch.setattr(method, "prompt", prompt_of_the_next_step)
    hook = register_optimizer_step_post_hook(count)
    with reads:
        run(backbone, method, rows, [])
    hook.remove()
    assert len({len(row.source.split()) for row in rows[:8]}) > 1, "there has to be padding"
    assert own
    waits = [step for step, read in reads.found if not any(read is counter for counter in own)]
    assert set(waits) <= {0, 10, 20, 25}
    assert 25 in waits, "whether the answer is finite is asked at the end, so questions are seen"


class Small(PromptTuning):
    """Trains where no more than so many rows fit, in the memory that is there from a step on."""

    def __init__(
        self, backbone: Backbone, initialization: Tensor, fits: int, *, since: int = 1, **options: Any
    ) -> None:
        given = Given(backbone=backbone, initialization=initialization)
        super().__init__(PromptTuningOptions(**{**OPTIONS, **options}), given)
        self.fits, self.since, self.steps = fits, since, 0

    def prompt(self) -> Tensor:
        self.steps += 1
        return self.P * 1  # a graph of its own, which the tries of a step have in common

    def loss(self, backbone: Backbone, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
        loss = super().loss(backbone, prompt, batch)
        if self.steps >= self.since and len(batch) > self.fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return loss


def test_where_memory_runs_out_a_batch_is_computed_in_more_parts(
    backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    events: list[dict[str, Any]] = []
    few = {"steps": 5, "learning_rate": 0.01}
    found = run(backbone, Small(backbone, prompt, 2, since=3, **few), rows, [], report=events.append)
    whole = run(backbone, prompt_tuning(backbone, prompt, **few), rows, [])
    torch.testing.assert_close(prompt_of(found), prompt_of(whole), rtol=0, atol=1e-4)
    assert [(event["step"], event["message"]) for event in events if event["type"] == "warning"] == [
        (3, "out of memory: from now on a batch is computed in 2 parts"),
        (3, "out of memory: from now on a batch is computed in 4 parts"),
    ]
    from_the_start = run(backbone, Small(backbone, prompt, 2), rows, [])
    in_parts = run(backbone, prompt_tuning(backbone, prompt, accumulation=4), rows, [])
    assert torch.equal(prompt_of(from_the_start), prompt_of(in_parts)), "nothing of the failed tries may be left"


def test_a_row_that_does_not_fit_is_the_end(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    with pytest.raises(OutOfMemory, match=r"out of memory at step 2: not even one row \(of up to \d+ tokens") as raised:
        run(backbone, Small(backbone, prompt, 0, since=2), rows, [])
    assert raised.value.reason == "out-of-memory"


def test_other_errors_are_no_lack_of_memory(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    class Broken(PromptTuning):
        def loss(self, *arguments: Any) -> Tensor:
            raise RuntimeError("shapes do not match")

    method = Broken(PromptTuningOptions(**OPTIONS), Given(backbone=backbone, initialization=prompt))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(backbone, method, rows, [])


def test_the_first_step_with_a_loss_that_is_no_number_is_named(
    backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    class Breaks(PromptTuning):
        calls = 0

        def prompt(self) -> Tensor:
            self.calls += 1
            return self.P * torch.nan if self.calls == 7 else self.P

    method = Breaks(PromptTuningOptions(**OPTIONS), Given(backbone=backbone, initialization=prompt))
    with pytest.raises(TrainingDiverged, match="the loss is no finite number at step 7") as raised:
        run(backbone, method, rows, [])
    assert (raised.value.reason, raised.value.step) == ("nan-loss", 7)


def test_a_prompt_that_is_no_number_is_never_a_result(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method = prompt_tuning(backbone, prompt, steps=1, learning_rate=1e37)
    method.P.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingDiverged, match="the soft prompt is no finite number at step 1"):
        run(backbone, method, rows, [])


def test_events_tell_the_run_in_order(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    events: list[dict[str, Any]] = []
    result = run(backbone, dtvg(backbone, prompt, steps=12, evaluate_every=5), rows, rows, report=events.append)
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert [event["step"] for event in events if event["type"] == "progress"] == [5, 10, 12]
    assert [(e["step"], e["value"]) for e in events if e["type"] == "evaluation"] == result.validations
    groups = [event for event in events if event["type"] == "group"]
    assert [(event["step"], tuple(event["members"])) for event in groups] == result.groups
    assert [event["changes"] for event in groups] == [*range(len(groups))]
    assert result.groups[0][0] == 1
    assert all(before[1] != after[1] for before, after in zip(result.groups, result.groups[1:], strict=False))
    assert events[-1] == {"type": "evaluation", "step": 12, "metric": "accuracy", "value": result.validations[-1][1]}


def test_what_report_raises_ends_the_run(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    def cancel(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(backbone, prompt_tuning(backbone, prompt), rows, rows, report=cancel)


LONG = " ".join(["w2"] * 17)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"train": []}, "there are no rows"),
        ({"train": [Row("w1", LONG)]}, "the target 'w2 w2 .*' has 17 tokens, max_target_tokens is 16"),
        ({"validation": [Row("w1", LONG)]}, "the target 'w2 w2 .*' has 17 tokens, max_target_tokens is 16"),
        ({"train": [Row("w1", " ")]}, "the target ' ' has no tokens"),
        ({"label_words": ("yes", LONG)}, "the target 'w2 w2 .*' has 17 tokens, max_target_tokens is 16"),
        ({"label_words": ("yes", "oui", "non")}, "the label words 'oui' and 'non' are the same tokens to this model"),
    ],
)
def test_bad_data_is_named_before_anything_is_done(
    backbone: Backbone, prompt: Tensor, rows: list[Row], task: dict[str, Any], message: str
) -> None:
    class Prepared(PromptTuning):
        def prepare(self, *arguments: Any) -> None:
            pytest.fail("an hour of preparation for nothing")

    method = Prepared(PromptTuningOptions(**OPTIONS), Given(backbone=backbone, initialization=prompt))
    good = Task(train=rows, validation=rows, label_words=("yes", "no"))
    with pytest.raises(DataError, match=message):
        train(backbone, method, [good, replace(good, **task)], options=method.options, seed=0)


def test_a_prompt_that_does_not_fit_the_model_is_named(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    with pytest.raises(OptionsError, match="the soft prompt has width 15, the model's embeddings 16"):
        run(backbone, prompt_tuning(backbone, prompt[:, 1:]), rows, [])
    if backbone.kind == "decoder-only":
        with pytest.raises(OptionsError, match=r"60 virtual tokens, .* are more than the model's context of 64"):
            run(backbone, prompt_tuning(backbone, prompt.repeat(20, 1)), rows, [])


def test_nothing_to_train_on_is_an_error(backbone: Backbone, prompt: Tensor) -> None:
    with pytest.raises(DataError, match="there is no task"):
        train(backbone, prompt_tuning(backbone, prompt), [], options=TrainingOptions(), seed=0)


def test_schedules() -> None:
    linear = TrainingOptions(steps=10, warmup_steps=4, schedule="linear")
    assert [rate(step, linear) for step in range(1, 11)] == pytest.approx(
        [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    constant = TrainingOptions(steps=10, warmup_steps=1, schedule="constant")
    assert [rate(step, constant) for step in range(1, 11)] == [0.5] + [1.0] * 9
    cosine = TrainingOptions(steps=5, warmup_steps=1, schedule="cosine")
    assert [rate(step, cosine) for step in range(1, 6)] == pytest.approx(
        [1 / 2, 1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2]
    )


def test_each_parameter_group_follows_the_schedule_at_its_own_rate(
    backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    """AdamW's first step moves every number by the rate, whatever its gradient."""
    options = {"steps": 1, "warmup_steps": 3, "weight_decay": 0.0, "adam_epsilon": 1e-20}
    method = dtvg(backbone, prompt, learning_rate=0.4, source_scale_learning_rate=0.8, **options)
    start = method.T_t.detach().clone()
    tensors = run(backbone, method, rows, []).snapshot.tensors
    torch.testing.assert_close((tensors["target_vector"] - start).abs(), torch.full_like(start, 0.1))
    group = list(method.members)
    assert group
    moved = (tensors["source_scales"][group] - 1).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2))


def test_a_clipped_gradient_has_the_norm_asked_for(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    """AdamW hides a gradient's scale unless epsilon is large: then the first step is rate * gradient / epsilon."""
    options = {"steps": 1, "learning_rate": 1.0, "adam_epsilon": 1e3, "weight_decay": 0.0, "clip_norm": 1e-2}
    result = run(backbone, prompt_tuning(backbone, prompt, **options), rows, [])
    assert float((prompt_of(result) - prompt).norm()) == pytest.approx(1e-2 / 1e3, rel=0.01)


def test_several_tasks_are_trained_and_judged_together(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    seen: Counter[int] = Counter()

    class Counts(PromptTuning):
        def loss(self, backbone: Backbone, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
            seen.update(example.task for example in batch)
            return super().loss(backbone, prompt, batch)

    other = [Row(source, "w7") for source, _ in rows[:8]]
    tasks = [
        Task(train=rows, validation=rows, label_words=("yes", "no")),
        Task(train=other, validation=other[:4], label_words=("w7", "w8")),
        Task(train=rows[:8], label_words=("yes", "no")),
    ]
    method = Counts(PromptTuningOptions(**OPTIONS), Given(backbone=backbone, initialization=prompt, tasks=3))
    result = train(backbone, method, tasks, options=method.options, seed=0)
    assert seen == {0: 24 * 6, 1: 8 * 6, 2: 8 * 6}  # 30 batches of 8 are six epochs of 40 rows
    alone = [
        evaluate(
            backbone,
            prompt_of(result),
            backbone.tokenize(task.validation, method.options, len(prompt)),
            label_words=task.label_words,
            options=method.options,
        ).value
        for task in tasks[:2]
    ]
    assert result.best_value == sum(alone) / 2


def test_no_steps_give_the_method_as_it_was_prepared(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    class Prepared(PromptTuning):
        def prepare(self, tasks: Sequence[Task], source_tasks: Sequence[Task], *more: Any) -> None:
            with torch.no_grad():
                self.P += len(tasks) + len(source_tasks)

    task = Task(train=rows, validation=rows, label_words=("yes", "no"))
    options = TpvSumOptions(steps=0, separator="|")
    method = Prepared(PromptTuningOptions(), Given(backbone=backbone, initialization=prompt))
    result = train(backbone, method, [task], [task, task], options=options, seed=0)
    assert torch.equal(prompt_of(result), prompt + 3)
    assert (result.steps, result.best_step, result.loss) == (0, 0, None)
    assert result.validations == [(0, result.best_value)]


class Scales(TuningMethod):
    """Gives each row a prompt of its own, longer the larger its embeddings, and sees the embeddings doubled."""

    artifact = True

    def __init__(self, options: TrainingOptions, given: Given) -> None:
        super().__init__()
        self.P = torch.nn.Parameter(given.initialization.clone())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.P], "lr": 0.1, "weight_decay": 0.0}]

    def prompt(self) -> Prompt:
        return partial(self.read, self.P)

    @staticmethod
    def read(P: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        largest = reading.embeddings.masked_fill(~reading.mask[..., None], -torch.inf).amax(dim=1)
        return P * largest[:, None], 2 * reading.embeddings

    def snapshot(self) -> Snapshot:
        P = self.P.detach().clone()
        return Snapshot(prompt=partial(self.read, P), tensors={"P": P})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.P.data = tensors["P"].clone()


def test_a_method_whose_prompt_is_a_function_is_left_as_it_was_at_its_best_step(
    backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    method = Scales(options := TrainingOptions(**OPTIONS), Given(backbone=backbone, initialization=prompt))
    task = Task(train=rows, validation=rows[:10], label_words=("yes", "no"))
    result = train(backbone, method, [task], options=options, seed=0)
    assert callable(result.snapshot.prompt)
    assert torch.equal(method.P, result.snapshot.tensors["P"])
    assert not torch.equal(method.P, prompt)
    examples = backbone.tokenize(rows[:10], options, len(prompt))
    again = evaluate(backbone, method.snapshot().prompt, examples, label_words=("yes", "no"), options=options)
    assert again.value == result.best_value
