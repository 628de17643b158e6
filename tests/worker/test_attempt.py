"""How an attempt judges what it reads back from the registry."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from tpv.errors import (
    ConnectionFailed,
    DamagedContent,
    Forbidden,
    NotFound,
    ProblemError,
    Unauthorized,
    Unavailable,
    from_problem,
)
from tpv_worker.attempt import THREADS, failure_of, threads_of
from tpv_worker.data import Row
from tpv_worker.errors import DataError, VerificationFailed
from tpv_worker.evaluation import Evaluation
from tpv_worker.figures import Figure, Judged, check_figures, metrics_of
from tpv_worker.methods import Snapshot
from tpv_worker.settings import Settings
from tpv_worker.training import TrainingResult


def figure(dataset: str, right: int, n: int, split: str = "validation", majority: float = 0.5) -> Figure:
    """The first `right` of n rows are answered right."""
    rows = [Row(f"text {i}", "yes") for i in range(n)]
    found = Evaluation(metric="accuracy", value=right / n, n=n, predictions=["yes"] * right + ["no"] * (n - right))
    return Figure(
        Judged(dataset=dataset, split=split, rows=rows, examples=[], label_words=None, majority=majority), found
    )


@pytest.mark.parametrize(("right", "n", "trained"), [(4, 8, 0.5), (3, 8, 0.5), (5, 8, 0.5), (490, 1000, 0.5)])
def test_one_row_or_a_hundredth_may_turn_by_rounding(right: int, n: int, trained: float) -> None:
    check_figures(trained, [figure("a", right, n), figure("a", 0, n, "test")], None)


@pytest.mark.parametrize(("right", "n", "trained"), [(2, 8, 0.5), (6, 8, 0.5), (489, 1000, 0.5)])
def test_a_stored_result_that_does_something_else_is_refused(right: int, n: int, trained: float) -> None:
    with pytest.raises(VerificationFailed, match=rf"of {n} validation rows right; the training process found 50\.00%"):
        check_figures(trained, [figure("a", right, n)], None)


def test_the_mean_of_the_tasks_on_the_rows_that_training_looked_at_is_compared() -> None:
    tasks = [figure("a", 10, 20), figure("b", 5, 10)]  # on their first ten rows 1 and 0.5
    check_figures(0.75, tasks, 10)
    with pytest.raises(VerificationFailed):
        check_figures(0.75, tasks, None)


def test_figures_of_further_data_sets_carry_their_name() -> None:
    result = TrainingResult(
        snapshot=Snapshot(prompt=lambda reading: (reading.embeddings, reading.embeddings)),
        best_step=2, best_value=None, steps=4, validations=[], groups=[], loss=None, wall_seconds=2.0, cpu_seconds=1.0,
    )  # fmt: skip
    figures = [figure("a:1", 4, 8, "test", 0.25), figure("lab/b:2", 2, 8, "test"), figure("lab/b:2", 6, 8)]
    assert metrics_of(result, figures, "a:1") == {
        "target_steps": 4,
        "best_step": 2,
        "wall_seconds": 2.0,
        "cpu_seconds": 1.0,
        "test/accuracy": 0.5,
        "test/majority": 0.25,
        "lab/b:2/test/accuracy": 0.25,
        "lab/b:2/test/majority": 0.5,
        "lab/b:2/validation/accuracy": 0.75,
        "lab/b:2/validation/majority": 0.5,
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("a row has no target"), "data"),
        (Unavailable("the store does not answer"), "unavailable"),
        (Unauthorized("the token has expired"), "unavailable"),
        (Forbidden("the token lacks the scope worker"), "unavailable"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "unavailable"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), "crashed"),
        (RuntimeError("CUDA error: out of memory"), "out-of-memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out-of-memory"),
        (RuntimeError("a tensor has the wrong shape"), "crashed"),
        # A device that has failed serves nobody any more until the process has ended; what has broken it is not known.
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "unavailable"),
        (torch.AcceleratorError("the device was lost"), "unavailable"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out-of-memory"),
        (ProblemError("something went wrong inside the service"), "unavailable"),
        (from_problem({"detail": "bad gateway"}, 502), "unavailable"),
        (ConnectionFailed("could not reach the service"), "unavailable"),
        (DamagedContent("the vector is damaged"), "conflict"),
        (NotFound("the version is gone"), "conflict"),
    ],
)
def test_a_failure_is_the_jobs_own_only_where_the_job_can_help_it(error: Exception, reason: str) -> None:
    assert failure_of(error).reason == reason


def test_a_failure_of_the_device_is_said_to_be_one() -> None:
    error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    assert failure_of(error).message.startswith("the device failed: CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, THREADS),
        ({"concurrency": 2}, max(1, THREADS // 2)),
        ({"concurrency": 2, "processes": 2}, max(1, THREADS // 4)),
        ({"concurrency": 2, "threads": 3}, 3),
    ],
)
def test_attempts_at_a_time_share_the_cores(given: dict[str, int], threads: int) -> None:
    assert threads_of(Settings(queue_url="postgresql://nowhere", **given)) == threads
