from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.conftest import Run, line

from tpv import torch_files
from tpv.errors import InvalidTensor, NotInstalled

TUNED = torch.tensor([[1.5, -2.0, 0.25], [1e-9, 3.0, 7.0]])


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    "content",
    [
        TUNED,
        torch.nn.Parameter(TUNED),  # DTVG's {task}.pt
        {"prompt_embeddings": TUNED},  # the adapter_model.bin of PEFT
        TUNED.double(),
        torch.stack([TUNED, TUNED]).transpose(1, 2)[0].T,  # a view
    ],
    ids=["tensor", "parameter", "dict", "double", "view"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_papers_files_are_read(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "mnli.pt", _use_new_zipfile_serialization=zipped)
    read = torch_files.read(tmp_path / "mnli.pt")
    assert (read.dtype, read.tolist()) == (np.float32, TUNED.tolist())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        torch.save(TUNED.to(dtype), tmp_path / "mnli.pt")
        assert torch_files.read(tmp_path / "mnli.pt").tolist() == TUNED.to(dtype).float().tolist()


def test_a_hostile_file_is_refused_in_one_line_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = {"torch": tmp_path / "a.pt", "dict": tmp_path / "b.bin", "plain": tmp_path / "c.pt"}
    torch.save(Hostile(mark), hostile["torch"])
    torch.save({"prompt_embeddings": Hostile(mark)}, hostile["dict"])
    hostile["plain"].write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    for path in hostile.values():
        told = line(run("import", "pt", path, "--as", "prompt", "-i", "family"))
        assert told.startswith(f"tpv: {path} is refused: it is not plain tensors, it asks for posix.system; nothing")
        assert "weights_only" not in told
    assert not mark.exists()
    with hostile["plain"].open("rb") as file:  # the file is what it is said to be
        pickle.load(file)  # noqa: S301 # shows that the file does what it threatens to do
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds a list; a soft prompt is a tensor"),
        ({}, "holds a dict of 'nothing'"),
        ({"state": TUNED, "step": 3}, "holds a dict of 'state, step'"),
        ({"prompt_embeddings": TUNED, "base": TUNED}, "a soft prompt is the one tensor prompt_embeddings"),
        (torch.ones(2, 3, dtype=torch.int64), "tensor of torch.int64; a soft prompt is one of floats"),
        (torch.eye(3).to_sparse(), "holds a torch.sparse_coo tensor"),
        (torch.ones(1).expand(10**6, 10**6), r"too few for its tensor of shape \[1000000, 1000000\]"),
        (torch.ones(2, 3, device="meta"), "too few for its tensor"),
        (torch.ones(3), r"shape \[3\]"),
        (torch.full((2, 3), torch.nan), "NaN"),
        (torch.full((2, 3), 1e300, dtype=torch.float64), "infinite as float32"),
        (torch.nn.Embedding(2, 3), "it asks for torch.nn.modules.sparse.Embedding"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # when the test makes the tensor
def test_what_is_no_soft_prompt_is_refused_by_what_it_is(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InvalidTensor, match=told):
        torch_files.read(tmp_path / "x.pt")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    torch.save(TUNED, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for content in (b"", b"hello" * 30, whole[:-90], whole[:60], b"\x80\x04]."):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(InvalidTensor, match=r"is no file of tensors as torch\.save writes it, or is damaged"):
            torch_files.read(tmp_path / "x.pt")


def test_without_torch_the_error_names_the_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TUNED, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import finds when there is none
    with pytest.raises(NotInstalled):
        torch_files.read(tmp_path / "x.pt")
    told = line(run("import", "pt", tmp_path / "x.pt", "--as", "prompt", "-i", "family"))
    assert told.endswith("to read it: pip install 'tpv-registry[torch]'")
