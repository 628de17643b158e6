"""Our PEFT directories against the library `peft` itself, and its directories against our backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tpv.peft
from tpv import TaskPromptVector, files
from tpv.errors import InvalidTensor
from tpv.methods import TrainingOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Example, Row

# Of peft 0.21 with transformers 5.23: an old name is asked for, and `generate` passes what PEFT leaves out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

OPTIONS = TrainingOptions(batch_size=8, separator=" | ")
TASK_TYPES: dict[str, tpv.peft.TaskType] = {"encoder-decoder": "SEQ_2_SEQ_LM", "decoder-only": "CAUSAL_LM"}


@pytest.fixture
def base(backbone: Backbone, model_paths: dict[str, Path]) -> Any:
    """The backbone's model, loaded anew as a user of PEFT does: PEFT changes the model that it wraps."""
    auto = AutoModelForSeq2SeqLM if backbone.kind == "encoder-decoder" else AutoModelForCausalLM
    return auto.from_pretrained(model_paths[backbone.kind])


@pytest.fixture
def examples(backbone: Backbone, rows: list[Row], prompt: Tensor) -> list[Example]:
    return backbone.tokenize([*rows[:3], Row("w3 w4 w5 w6", "w7 w8 w9")], OPTIONS, len(prompt))


@torch.no_grad()
def our_logits(backbone: Backbone, prompt: np.ndarray, example: Example) -> Tensor:
    """Logits (target tokens, vocabulary) that the backbone's loss is computed from."""
    seen: list[Tensor] = []
    hook = backbone.model.register_forward_hook(lambda model, inputs, output: seen.append(output.logits[0]))
    backbone.loss(torch.tensor(prompt), [example])
    hook.remove()
    [logits] = seen
    return logits[-len(example.target) :]


@torch.no_grad()
def their_logits(model: Any, backbone: Backbone, example: Example) -> Tensor:
    target = torch.tensor([example.target])
    if backbone.kind == "encoder-decoder":
        source = torch.tensor([example.source])
        logits = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
    else:
        ids = torch.tensor([example.source + example.target[:-1]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -target.shape[1] :]
    found: Tensor = logits[0]
    return found


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def peft_model(base: Any, backbone: Backbone, rows: int, **options: Any) -> Any:
    """A prompt-tuning model as a user of PEFT makes it, with the library's own defaults."""
    config = peft.PromptTuningConfig(task_type=TASK_TYPES[backbone.kind], num_virtual_tokens=rows, **options)
    return peft.get_peft_model(base, config).eval()


# --- Export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_peft_reads_what_is_exported_as_the_backbone_reads_the_prompt(
    backbone: Backbone, base: Any, examples: list[Example], prompt: Tensor, tmp_path: Path, scale: float
) -> None:
    start = backbone.embeddings[7:10].numpy()
    T = TaskPromptVector.from_prompt(prompt, start)
    task_type = TASK_TYPES[backbone.kind]
    path = T.to_peft(tmp_path / "out", start, base_model="tiny", task_type=task_type, scale=scale)
    ours = [our_logits(backbone, T.apply(start, scale), example) for example in examples]

    loaded = peft.PeftModel.from_pretrained(base, path).eval()
    same(ours, [their_logits(loaded, backbone, example) for example in examples])
    config = loaded.peft_config["default"]
    assert (config.num_virtual_tokens, config.num_transformer_submodules) == (3, 1)
    assert config.base_model_name_or_path == "tiny"

    plain = [our_logits(backbone, start, example) for example in examples]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(ours, plain, strict=True)), "the prompt has to matter here"


def test_peft_generates_what_the_backbone_generates(
    backbone: Backbone, base: Any, examples: list[Example], prompt: Tensor, tmp_path: Path
) -> None:
    start = backbone.embeddings[7:10].numpy()
    T = TaskPromptVector.from_prompt(prompt, start)
    path = T.to_peft(tmp_path / "out", start, base_model="tiny", task_type=TASK_TYPES[backbone.kind])
    loaded = peft.PeftModel.from_pretrained(base, path).eval()

    texts = []
    for example in examples:
        ids = torch.tensor([example.source])
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
        written = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0]
        written = written if backbone.kind == "encoder-decoder" else written[-4:]
        texts.append(backbone.tokenizer.decode(written, skip_special_tokens=True))

    read = torch.tensor(tpv.peft.read(path).tensor)
    assert [backbone.generate(read, [example], 4)[0] for example in examples] == texts


def test_a_tuned_export_comes_back_as_a_new_prompt(
    backbone: Backbone, base: Any, model_paths: dict[str, Path], prompt: Tensor, tmp_path: Path
) -> None:
    """PEFT writes into the directory that it has loaded; our files beside it tell of the vector that it was."""
    start = backbone.embeddings[7:10].numpy()
    T = TaskPromptVector.from_prompt(prompt, start)
    path = T.to_peft(
        tmp_path / "out",
        start,
        base_model=str(model_paths[backbone.kind]),
        task_type=TASK_TYPES[backbone.kind],
        reference="default/mnli:3",
    )
    assert tpv.peft.read(path).vector == T
    model = peft.PeftModel.from_pretrained(base, path)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight += 1
    model.save_pretrained(path)

    read = tpv.peft.read(path)
    assert (read.vector, read.reference, read.dead_rows) == (None, "default/mnli:3", 0)
    np.testing.assert_array_equal(read.tensor, T.apply(start) + 1)


# --- Import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["default", "mnli"])
def test_the_backbone_reads_what_peft_has_saved_as_peft_does(
    backbone: Backbone, base: Any, examples: list[Example], tmp_path: Path, adapter: str
) -> None:
    config = peft.PromptTuningConfig(task_type=TASK_TYPES[backbone.kind], num_virtual_tokens=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(base, config, adapter_name=adapter).eval()
    model.save_pretrained(tmp_path)
    stored = files.read(next(tmp_path.glob("**/adapter_model.safetensors")))["prompt_embeddings"]

    read = tpv.peft.read(tmp_path)
    doubled = backbone.kind == "encoder-decoder"
    assert read.dead_rows == (3 if doubled else 0)
    assert stored.shape == ((6, 16) if doubled else (3, 16))
    np.testing.assert_array_equal(read.tensor, stored[:3])
    same(
        [our_logits(backbone, read.tensor, example) for example in examples],
        [their_logits(model, backbone, example) for example in examples],
    )


def test_rows_that_are_left_out_have_no_gradient(backbone: Backbone, base: Any, examples: list[Example]) -> None:
    """The fact that leaving them out rests on."""
    model = peft_model(base, backbone, 3)
    source, target = torch.tensor([examples[0].source]), torch.tensor([examples[0].target])
    ids = source if backbone.kind == "encoder-decoder" else torch.cat([source, target], dim=1)
    model(input_ids=ids, labels=target if backbone.kind == "encoder-decoder" else ids).loss.backward()
    moved = model.prompt_encoder["default"].embedding.weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [True] * 3 + [False] * (len(moved) - 3)
    assert len(moved) == (6 if backbone.kind == "encoder-decoder" else 3)


def test_pickled_weights_are_read_too(backbone: Backbone, base: Any, tmp_path: Path) -> None:
    model = peft_model(base, backbone, 3)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not list((tmp_path / "pickled").glob("*.safetensors"))
    np.testing.assert_array_equal(
        tpv.peft.read(tmp_path / "pickled").tensor, tpv.peft.read(tmp_path / "safe").tensor, strict=True
    )


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]),
        peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_tasks=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_of_another_kind_are_refused_by_name(
    config: Any, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    peft.get_peft_model(Backbone.load(model_paths["encoder-decoder"]).model, config).save_pretrained(tmp_path)
    with pytest.raises(InvalidTensor, match=f"'{config.peft_type.value}' adapter"):
        tpv.peft.read(tmp_path)
