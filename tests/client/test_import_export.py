"""`tpv import` and `tpv export` against a fake registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.conftest import PEFT_CONFIG, FakeRegistry, Run, Wire, line, parts, peft_directory

from tpv import TaskPromptVector, files, peft

START = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
T = TaskPromptVector(np.array([[0.1, 0.2, 0.3], [1e-9, 0.5, -7.0]]), files.fingerprint(START))
TUNED = T.apply(START)


@pytest.fixture
def family(registry: FakeRegistry, wire: Wire) -> dict[str, Any]:
    """A registry with the initialization START, named family, and the vector T, named mnli."""
    start = wire.initialization("family", START)
    start["base_model"] |= {"architecture": "T5ForConditionalGeneration", "revision": "c" * 40}
    summary = {key: start[key] for key in start if key not in ("base_model", "strategy", "parameters")}
    version = wire.version("mnli", 3, T.tensor, initialization={**summary, "base_model": "t5-base"})
    for key in ("family", start["id"], start["fingerprint"]):
        registry.on(f"GET /initializations/default/{key}", start)
    registry.on(f"GET /initializations/default/{start['id']}/content", wire.content(files.dump({"prompt": START})))
    registry.on("GET /vectors/default/mnli/versions/@best", version)
    registry.on("GET /vectors/default/mnli/versions/3/content", wire.content(files.dump({"vector": T.tensor})))
    registry.on("POST /vectors/default/mine/versions", wire.version("mine"))
    return start


def registered(registry: FakeRegistry) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of the version that was registered."""
    [request] = registry.asked("POST /vectors/default/mine/versions")
    fields, content = parts(request)
    return json.loads(fields["metadata"]), dict(files.load(content["file"]))


# --- PEFT -------------------------------------------------------------------------------------------------------------


def test_a_vector_goes_out_and_comes_back(
    run: Run, registry: FakeRegistry, family: dict[str, Any], tmp_path: Path
) -> None:
    shown = run("export", "peft", "mnli@best", tmp_path / "mine")
    assert shown.out == f"exported mnli:3 to {tmp_path / 'mine'}, a SEQ_2_SEQ_LM prompt for t5-base\n"
    config = peft.read(tmp_path / "mine").config
    assert (config.base_model_name_or_path, config.revision) == ("t5-base", "c" * 40)

    shown = run("import", "peft", tmp_path / "mine", "--task", "nli")
    assert shown.out.splitlines()[0] == "this is the vector of mnli:3, bit for bit"
    assert shown.out.splitlines()[1].startswith("registered mine:1  sha256:")
    metadata, tensors = registered(registry)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {"vector": T.tensor.tobytes()}
    assert (metadata["fingerprint"], metadata["initialization"]) == (T.fingerprint, "default/family")
    assert metadata["task"] == ["nli"]
    assert metadata["provenance"]["imported_from"] == "peft"
    assert metadata["provenance"]["exported_from"] == "default/mnli:3"


def test_an_export_says_in_json_what_it_is(run: Run, family: dict[str, Any], tmp_path: Path) -> None:
    shown = run("export", "peft", "mnli@best", tmp_path / "out", "--scale", "0.5", "--json")
    assert shown.json == {
        "reference": "default/mnli:3",
        "path": str(tmp_path / "out"),
        "base_model": "t5-base",
        "revision": "c" * 40,
        "task_type": "SEQ_2_SEQ_LM",
        "initialization": files.fingerprint(START),
        "scale": 0.5,
    }
    np.testing.assert_array_equal(peft.read(tmp_path / "out").tensor, T.apply(START, 0.5))


@pytest.mark.parametrize(
    ("architecture", "task_type"),
    [("LlamaForCausalLM", "CAUSAL_LM"), ("MT5ForConditionalGeneration", "SEQ_2_SEQ_LM"), (None, None), ("X", None)],
)
def test_the_kind_of_model_is_what_a_worker_has_seen(
    run: Run, family: dict[str, Any], tmp_path: Path, architecture: str | None, task_type: str | None
) -> None:
    family["base_model"]["architecture"] = architecture
    shown = run("export", "peft", "mnli@best", tmp_path / "out", "--json")
    if task_type is None:
        assert (shown.code, "--task-type" in shown.err) == (1, True)
        shown = run("export", "peft", "mnli@best", tmp_path / "out", "--task-type", "CAUSAL_LM", "--json")
    assert shown.json["task_type"] == (task_type or "CAUSAL_LM")


def test_an_export_to_another_initialization_names_the_flag(
    run: Run, registry: FakeRegistry, wire: Wire, family: dict[str, Any], tmp_path: Path
) -> None:
    other = {**wire.initialization("other", START + 1), "base_model": family["base_model"]}
    registry.on("GET /initializations/default/other", other)
    content = wire.content(files.dump({"prompt": START + 1}))
    registry.on(f"GET /initializations/default/{other['id']}/content", content)
    arguments = ["export", "peft", "mnli@best", tmp_path / "out", "-i", "other"]
    told = line(run(*arguments))
    assert all(word in told for word in ("family", "other", "--allow-mixed-initializations"))
    assert run(*arguments, "--allow-mixed-initializations").code == 0
    np.testing.assert_array_equal(peft.read(tmp_path / "out").tensor, START + 1 + T.tensor)

    registry.on("GET /initializations/default/other", wire.initialization("other", START + 1, base_model={
        **family["base_model"], "id": wire.id_of("llama"), "name": "llama"}))  # fmt: skip
    told = line(run(*arguments, "--allow-mixed-initializations"))
    assert "the base model t5-base, the initialization to llama" in told


def test_dead_rows_are_left_out_and_named(
    run: Run, registry: FakeRegistry, family: dict[str, Any], tmp_path: Path
) -> None:
    directory = peft_directory(tmp_path / "mine", base_model_name_or_path="google/t5-v1_1-base")
    shown = run("import", "peft", directory, "--initialization", "family").out.splitlines()
    assert shown[0] == "mind: the adapter was made for 'google/t5-v1_1-base', the initialization is of 't5-base'"
    assert shown[1] == "kept the first 2 of 4 rows: the model reads no others"
    metadata, tensors = registered(registry)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"prompt": [[0, 1, 2], [3, 4, 5]]}
    assert metadata["provenance"] == {
        "imported_from": "peft",
        "adapter_config": {**PEFT_CONFIG, "base_model_name_or_path": "google/t5-v1_1-base"},
        "dead_rows": 2,
    }
    shown = run("import", "peft", directory, "other/mine", "-i", "family", "--json")
    assert shown.code == 1, "the name that is given decides"


def test_the_initialization_may_come_along(
    run: Run, registry: FakeRegistry, wire: Wire, family: dict[str, Any], tmp_path: Path
) -> None:
    """Its dead rows are left out as the prompt's are."""
    first = np.concatenate([START, 9 * START])
    registry.on("POST /initializations", family)
    peft_directory(tmp_path / "mine", base_model_name_or_path="t5-base", revision="c" * 40)
    (tmp_path / "start.safetensors").write_bytes(files.dump({"prompt_embeddings": first}))
    for start in (peft_directory(tmp_path / "start", first), tmp_path / "start.safetensors"):
        registry.requests.clear()
        run("import", "peft", tmp_path / "mine", "-i", "family", "--init-file", start)
        [request] = registry.asked("POST /initializations")
        fields, content = parts(request)
        assert json.loads(fields["metadata"])["base_model"] == {"id": "t5-base", "revision": "c" * 40}
        assert json.loads(fields["metadata"])["name"] == "family"
        np.testing.assert_array_equal(files.load(content["file"])["prompt"], START)
        assert registered(registry)[0]["initialization"] == "default/family"


@pytest.mark.parametrize(
    ("prompt", "config", "told"),
    [
        (np.zeros((4, 5), np.float32), {"token_dim": 5}, "the prompt has 2 rows of width 5, initialization family has"),
        (np.zeros((2, 3), np.float32), {"num_virtual_tokens": 1}, "its last 1 are dead rows too, register the others"),
    ],
    ids=["width", "dead rows of the initialization"],
)
def test_an_initialization_of_another_shape_is_refused(
    run: Run, registry: FakeRegistry, family: dict[str, Any], tmp_path: Path, prompt: Any, config: Any, told: str
) -> None:
    assert told in line(run("import", "peft", peft_directory(tmp_path / "mine", prompt, **config), "-i", "family"))
    assert not registry.asked("POST /vectors/default/mine/versions")


def test_the_initialization_has_to_be_known(run: Run, family: dict[str, Any], tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "mine")
    assert run("import", "peft", directory).code == 2
    assert run("import", "peft", directory, "--init-file", directory).code == 2, "of which model it is nobody says"
    assert line(run("import", "peft", directory, "-i", "gone")).startswith("tpv: there is nothing at")


def test_an_export_belongs_to_its_own_initialization(
    run: Run, registry: FakeRegistry, wire: Wire, family: dict[str, Any], tmp_path: Path
) -> None:
    T.to_peft(tmp_path / "mine", START, base_model="t5-base", task_type="CAUSAL_LM")
    registry.on("GET /initializations/default/other", wire.initialization("other", START + 1))
    told = line(run("import", "peft", tmp_path / "mine", "-i", "other"))
    assert f"belongs to the initialization {files.fingerprint(START)}" in told

    tuned = {"prompt_embeddings": TUNED + 1}
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(files.dump(tuned))
    assert line(run("import", "peft", tmp_path / "mine", "-i", "other")).startswith(told.partition(" this one")[0])
    assert run("import", "peft", tmp_path / "mine").code == 0
    metadata, _ = registered(registry)
    assert metadata["initialization"] == "default/family"


def test_an_export_without_its_vector_is_refused(run: Run, family: dict[str, Any], tmp_path: Path) -> None:
    T.to_peft(tmp_path / "mine", START, base_model="t5-base", task_type="CAUSAL_LM")
    (tmp_path / "mine" / "task_vector.safetensors").unlink()
    assert "is missing, which tpv.json names; remove that too" in line(run("import", "peft", tmp_path / "mine"))


# --- Files of torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "vector"])
def test_a_file_is_registered_as_what_it_is(
    run: Run, registry: FakeRegistry, family: Any, tmp_path: Path, kind: str
) -> None:
    torch.save(torch.tensor(T.tensor) if kind == "vector" else torch.tensor(TUNED), tmp_path / "mine.pt")
    assert run("import", "pt", tmp_path / "mine.pt", "--as", kind, "-i", "family").out.startswith("registered mine:1")
    metadata, tensors = registered(registry)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        kind: (T.tensor if kind == "vector" else TUNED).tolist()
    }
    assert metadata["provenance"] == {"imported_from": "pt", "file": "mine.pt", "as": kind, "dead_rows": 0}


def test_how_many_rows_are_alive_has_to_be_said(
    run: Run, registry: FakeRegistry, wire: Wire, family: Any, tmp_path: Path
) -> None:
    """Unless the registry's initialization has as many rows as the file."""
    torch.save(torch.tensor(np.concatenate([TUNED, 7 * TUNED])), tmp_path / "mine.bin")
    torch.save({"prompt_embeddings": torch.tensor(np.concatenate([START, START]))}, tmp_path / "start.bin")
    call = ["import", "pt", tmp_path / "mine.bin", "--as", "prompt", "-i", "family"]

    assert "the prompt has 4 rows of width 3, initialization family has 2" in (told := line(run(*call)))
    assert told.endswith("tpv import pt --live-rows N")
    assert run(*call, "--live-rows", "5").code == 2
    assert "the prompt has 1 rows of width 3" in line(run(*call, "--live-rows", "1"))
    along = ["--init-file", tmp_path / "start.bin", "--base-model", "t5-base", "--unpinned"]
    assert run(*call, *along).code == 2, "both files may have dead rows"

    registry.on("POST /initializations", family)
    shown = run(*call, *along, "--live-rows", "2")
    assert shown.out.splitlines()[0] == "kept the first 2 of 4 rows: the model reads no others"
    metadata, tensors = registered(registry)
    assert tensors["prompt"].tolist() == TUNED.tolist()
    assert metadata["provenance"]["dead_rows"] == 2
