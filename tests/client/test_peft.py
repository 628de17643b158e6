"""PEFT directories without the library `peft`; `tests/worker/test_peft.py` has the library read and write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.client.conftest import PEFT_CONFIG, peft_directory

from tpv import TaskPromptVector, files, peft
from tpv.errors import IncompatibleVectors, Invalid, InvalidReference, InvalidTensor

START = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
T = TaskPromptVector(np.array([[0.1, 0.2, 0.3], [1e-9, 0.5, -7.0]]), files.fingerprint(START))
prompts = hnp.arrays(np.float32, (2, 3), elements=st.floats(-1000, 1000, width=32))


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_a_directory_has_what_peft_wants_and_what_we_want_back(tmp_path: Path) -> None:
    path = T.to_peft(tmp_path / "a/b", START, base_model="t5-base", revision="c" * 40, task_type="SEQ_2_SEQ_LM")
    assert path == tmp_path / "a/b"
    assert json.loads((path / "adapter_config.json").read_text()) == {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 2,
        "num_transformer_submodules": 1,
        "token_dim": 3,
        "base_model_name_or_path": "t5-base",
        "revision": "c" * 40,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    content = (path / "adapter_model.safetensors").read_bytes()
    assert files.metadata(content) == {"format": "pt"}
    [(name, prompt)] = files.load(content).items()
    assert name == "prompt_embeddings"
    np.testing.assert_array_equal(prompt, T.apply(START))
    np.testing.assert_array_equal(files.read(path / "initialization.safetensors")["prompt"], START)
    assert json.loads((path / "tpv.json").read_text()) == {
        "reference": None,
        "vector": T.fingerprint,
        "initialization": T.initialization,
        "scale": 1.0,
        "prompt": files.fingerprint(prompt),
    }


@given(prompts, prompts, st.floats(-4, 4, width=16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_t_comes_back_bit_for_bit_at_any_scale(
    tmp_path_factory: pytest.TempPathFactory, start: np.ndarray, tensor: np.ndarray, scale: float
) -> None:
    vector = TaskPromptVector(tensor, files.fingerprint(start))
    path = tmp_path_factory.mktemp("export")
    vector.to_peft(path, start, base_model="m", task_type="CAUSAL_LM", scale=scale, reference="a/b:3")
    read = peft.read(path)
    assert read.vector == vector
    assert (read.reference, read.dead_rows) == ("a/b:3", 0)
    np.testing.assert_array_equal(read.tensor, vector.apply(start, scale))


def test_another_initialization_has_to_be_asked_for(tmp_path: Path) -> None:
    options: Any = {"base_model": "m", "task_type": "CAUSAL_LM"}
    with pytest.raises(IncompatibleVectors):
        T.to_peft(tmp_path / "out", START + 1, **options)
    T.to_peft(tmp_path / "out", START + 1, **options, allow_mixed_initializations=True)
    read = peft.read(tmp_path / "out")
    assert read.vector == T
    np.testing.assert_array_equal(read.tensor, START + 1 + T.tensor)


@pytest.mark.parametrize("there", ["file", "full"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    target = tmp_path / "out"
    if there == "full":
        target.mkdir()
    kept = target / "kept" if there == "full" else target
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match="out is there already"):
        T.to_peft(target, START, base_model="m", task_type="CAUSAL_LM")
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(vector: TaskPromptVector, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(TaskPromptVector, "save", full)
    with pytest.raises(OSError, match="No space"):
        T.to_peft(tmp_path / "out", START, base_model="m", task_type="CAUSAL_LM")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"task_type": "SEQ_CLS"}, Invalid),
        ({"scale": float("nan")}, InvalidTensor),
        ({"initialization": START[:1]}, IncompatibleVectors),
    ],
    ids=["task type", "scale", "shape"],
)
def test_a_bad_call_writes_nothing(tmp_path: Path, changes: dict[str, Any], error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"initialization": START, "base_model": "m", "task_type": "CAUSAL_LM", **changes}
    with pytest.raises(error):
        T.to_peft(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rows", "dead"),
    [
        ({}, 4, 2),
        ({"num_transformer_submodules": None}, 4, 2),
        ({"num_transformer_submodules": 2}, 4, 2),
        ({"num_transformer_submodules": 1}, 2, 0),
        ({"task_type": "CAUSAL_LM"}, 2, 0),
        ({"token_dim": None}, 4, 2),
    ],
)
def test_live_rows_are_kept_and_dead_ones_counted(tmp_path: Path, config: dict[str, Any], rows: int, dead: int) -> None:
    tensor = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    read = peft.read(peft_directory(tmp_path, tensor, **config))
    np.testing.assert_array_equal(read.tensor, tensor[:2])
    assert (read.dead_rows, read.vector, read.reference) == (dead, None, None)


def test_of_a_configuration_only_plain_facts_are_taken(tmp_path: Path) -> None:
    harmful = {"auto_mapping": {"parent_library": "os"}, "tokenizer_kwargs": {"trust_remote_code": True}}
    read = peft.read(peft_directory(tmp_path, **harmful, peft_version="0.21.2", modules_to_save=["x"]))
    assert read.config.model_dump(exclude_unset=True) == {**PEFT_CONFIG, "peft_version": "0.21.2"}


def test_an_adapter_of_another_name_is_found_in_its_folder(tmp_path: Path) -> None:
    peft_directory(tmp_path / "mnli")
    assert peft.read(tmp_path).dead_rows == 2
    peft_directory(tmp_path / "rte")
    with pytest.raises(InvalidTensor, match=r"several adapters; name one of: .*mnli, .*rte"):
        peft.read(tmp_path)
    assert peft.read(tmp_path / "rte").dead_rows == 2


def replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def config(**members: Any) -> Callable[[Path], object]:
    return lambda path: peft_directory(path, **members)


def cut(path: Path) -> None:
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "no JSON": (replace("adapter_config.json", b"{"), "is no JSON"),
    "no object": (replace("adapter_config.json", b"[]"), "is no JSON object"),
    "deep": (replace("adapter_config.json", b"[" * 100_000), "is no JSON"),
    "huge": (replace("adapter_config.json", b" " * (files.HEADER_LIMIT + 1)), "more than 1048576 bytes"),
    "LoRA": (config(peft_type="LORA"), "this is a 'LORA' adapter; only PROMPT_TUNING"),
    "no kind": (config(peft_type=None), "this is a None adapter"),
    "classifier": (config(task_type="SEQ_CLS"), "task_type: Input should be"),
    "no task type": (config(task_type=None), "task_type: Input should be"),
    "text": (
        lambda path: peft_directory(path, num_virtual_tokens="2"),
        "num_virtual_tokens: Input should be a valid integer",
    ),
    "none": (config(num_virtual_tokens=0), "num_virtual_tokens: Input should be greater"),
    "width": (
        lambda path: peft_directory(path, token_dim=5),
        r"the prompt is \[4, 3\], adapter_config.json says \[4, 5\]",
    ),
    "rows": (config(num_virtual_tokens=3), r"the prompt is \[4, 3\], .* says \[6, 3\]"),
    "causal": (
        lambda path: peft_directory(path, task_type="CAUSAL_LM", num_transformer_submodules=2),
        "a single module",
    ),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "truncated": (cut, "adapter_model.safetensors: the file is truncated"),
    "other tensor": (replace("adapter_model.safetensors", files.dump({"lora_A": START})), r"has \['lora_A'\]"),
    "vocabulary": (
        replace("adapter_model.safetensors", files.dump({"prompt_embeddings": START, "word_embeddings": START})),
        "a soft prompt is the one tensor prompt_embeddings",
    ),
    "one side": (replace("adapter_model.safetensors", files.dump({"prompt_embeddings": START[0]})), r"shape \[3\]"),
    "pickle": (replace("adapter_model.safetensors", b"\x80\x04]."), "shorter than a safetensors header"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    spoil, reason = BAD[name]
    spoil(peft_directory(tmp_path / "adapter"))
    with pytest.raises(InvalidTensor, match=reason):
        peft.read(tmp_path / "adapter")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTensor, match="gone is no directory"):
        peft.read(tmp_path / "gone")


def test_an_export_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    def export() -> Path:
        return T.to_peft(tmp_path / "out", START, base_model="m", task_type="CAUSAL_LM", reference="mnli:1")

    path = export()
    TaskPromptVector(T.tensor + 1, T.initialization).save(path / "task_vector.safetensors")
    with pytest.raises(InvalidTensor, match=r"is not the vector that tpv\.json names"):
        peft.read(path)
    (path / "tpv.json").write_text("{}")
    with pytest.raises(InvalidTensor, match="vector: Field required"):
        peft.read(path)
    facts = {"vector": "x", "initialization": "x", "scale": 1.0, "prompt": "x"}
    (path / "tpv.json").write_text(json.dumps({**facts, "reference": "\x1b[2Jmnli"}))
    with pytest.raises(InvalidReference, match=r"\\x1b"):
        peft.read(path)
