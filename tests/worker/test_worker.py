"""What the worker process decides by itself."""

from __future__ import annotations

import pytest
import torch

from tpv_worker.capabilities import devices
from tpv_worker.worker import Slots, _death


def test_cuda_is_every_gpu_that_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices("cpu") == ["cpu"]
    assert devices("cuda:1") == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # torch's own look at CUDA_VISIBLE_DEVICES
    assert devices("cuda") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="there is no GPU here"):
        devices("cuda")


def test_each_device_has_one_attempt_at_a_time() -> None:
    slots = Slots(["cuda:0", "cuda:1"], None)
    assert slots.count == 2
    with slots.take() as first:
        with slots.take() as second:
            assert (first, second) == ("cuda:0", "cuda:1")
        with slots.take() as third:
            assert third == "cuda:1"
    with slots.take() as fourth:
        assert fourth == "cuda:0"


def test_more_attempts_are_spread_over_the_devices() -> None:
    slots = Slots(["cuda:0", "cuda:1"], 4)
    assert slots.count == 4
    with slots.take() as one, slots.take() as two, slots.take() as three, slots.take() as four:
        assert [one, two, three, four] == ["cuda:0", "cuda:1"] * 2


def test_no_more_is_said_of_a_death_than_is_known() -> None:
    assert _death(-9).message == (
        "the training process was ended by signal SIGKILL, often the system's answer when memory runs out"
    )
    assert _death(-11).message == "the training process was ended by signal SIGSEGV"
    assert [_death(status).reason for status in (-9, -11, 1)] == ["killed", "killed", "crashed"]
