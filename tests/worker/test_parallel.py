"""Two processes that train together, over gloo, against one that is alone."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from tpv.methods import DtvgOptions, MptOptions, TrainingOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import Dtvg, Given, Mpt
from tpv_worker.parallel import Place, sum_gradients, together
from tpv_worker.training import TrainingResult, train

# A large epsilon: else Adam would make rounding errors in tiny gradients as large as the learning rate.
OPTIONS: dict[str, Any] = {"steps": 6, "evaluate_every": 2, "learning_rate": 0.02, "adam_epsilon": 0.1}
OPTIONS |= {"separator": "|", "clip_norm": 1.0}
LABELS = ("yes", "no", "w5 yes")


def work(paths: list[Path]) -> dict[str, Any]:
    """Runs on each model: of a method that groups, with batches that split unevenly, and of one row; and of one that
    samples tasks.
    """
    rows = [Row(f"w{i} " * (1 + i % 4), LABELS[i % 3]) for i in range(2, 13)]
    found: dict[str, Any] = {}
    for path in paths:
        backbone = Backbone.load(path)
        backbone.model.double()  # what is left is the rounding of the parameters
        P_init, target, *sources = 0.3 * torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(3))
        given = Given(backbone=backbone, initialization=P_init, target=target, sources=torch.stack(sources))
        grouping = OPTIONS | {"source_scale_learning_rate": 0.02}
        methods: dict[str, Dtvg | Mpt] = {
            "uneven": Dtvg(DtvgOptions(**grouping, batch_size=5), given),
            "one row": Dtvg(DtvgOptions(**grouping, batch_size=1, accumulation=2), given),
            "sampled": Mpt(MptOptions(**OPTIONS, batch_size=5, source_steps=4, task_learning_rate=0.02), given),
        }
        for name, method in methods.items():
            task = Task(train=rows, validation=rows, label_words=LABELS)
            result = train(backbone, method, [task], [task] * 3, options=method.options, seed=0)
            found |= {f"{path.name}, {name}, {key}": value for key, value in figures(backbone, result, rows).items()}
    return found


def figures(backbone: Backbone, result: TrainingResult, rows: list[Row]) -> dict[str, Any]:
    prompt, options = result.snapshot.prompt, TrainingOptions(**OPTIONS, batch_size=4)
    examples = backbone.tokenize(rows, options, 3)
    texts = evaluate(backbone, prompt, examples, label_words=None, options=options)
    scored = evaluate(backbone, prompt, examples, label_words=LABELS, options=options)
    known = {"groups": result.groups, "validations": result.validations, "loss": result.loss, "best": result.best_step}
    tensors = {"prompt": prompt, **result.snapshot.tensors}
    return {"texts": texts.predictions, "labels": scored.predictions, **known, **tensors}


def join(rank: int, place: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )


@pytest.mark.slow
def test_two_processes_train_what_one_would(model_paths: dict[str, Path], tmp_path: Path) -> None:
    paths = list(model_paths.values())
    alone = work(paths)
    arguments = [str(tmp_path / "place"), str(tmp_path / "second"), *map(str, paths)]
    with subprocess.Popen([sys.executable, __file__, *arguments]) as other:
        try:
            join(0, arguments[0])
            together = work(paths)
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
            else:
                other.kill()
    assert other.returncode == 0
    second = torch.load(tmp_path / "second")
    assert alone.keys() == together.keys() == second.keys()
    for name, value in alone.items():
        if isinstance(value, Tensor):
            assert torch.equal(together[name], second[name]), f"{name}: the processes have drifted apart"
            torch.testing.assert_close(together[name], value, rtol=1e-6, atol=1e-6)
        elif isinstance(value, float):
            assert together[name] == second[name] == pytest.approx(value, rel=1e-6)  # some places of float32
        else:
            assert together[name] == second[name] == value


def some_gradients(rank: int, meeting: Path, found: Connection) -> None:
    """The first parameter has one in both processes, the second and third in one each, the last in none."""
    with together(Place(rank, 2, str(meeting)), "cpu"):
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
        for i in (0, 1 + rank):
            parameters[i].grad = torch.full((2,), 10.0**i)
        sum_gradients(parameters)
    found.send([None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters])


def test_gradients_that_some_processes_lack_are_added_to_nothing_else(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    pipes = [forks.Pipe(duplex=False) for _ in range(2)]
    processes = [
        forks.Process(target=some_gradients, args=(rank, tmp_path / "meeting", theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [ours.recv() for ours, _ in pipes] == [[[2.0, 2.0], [10.0, 10.0], [100.0, 100.0], None]] * 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    join(1, sys.argv[1])
    torch.save(work([Path(path) for path in sys.argv[3:]]), sys.argv[2])
    distributed.destroy_process_group()
