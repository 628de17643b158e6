"""PEFT directories: soft prompts as Hugging Face's library `peft` saves and loads them, without torch or peft.

What is in such a directory, as read in peft 0.21.2 (https://github.com/huggingface/peft, `src/peft`), and tested with
it:

- `adapter_config.json` names the method: PROMPT_TUNING is a soft prompt of input embeddings, all else is not.
- `adapter_model.safetensors` (or `adapter_model.bin`, a pickle file) holds one tensor, `prompt_embeddings`, of
  num_virtual_tokens * num_transformer_submodules rows (`tuners/prompt_tuning/model.py`).
- num_transformer_submodules is 2 for SEQ_2_SEQ_LM unless the user says 1, but the forward pass puts only the first
  num_virtual_tokens rows in front of the encoder's input (`peft_model.py`, `PeftModelForSeq2SeqLM.forward`). The other
  rows are dead: no output depends on them, they get no gradient, and they are no part of a soft prompt.
- An adapter of another name than `default` lies in a sub-folder of that name.

Beside these, `write` puts files of ours that PEFT does not look at: `tpv.json`, T and P_init. P_init + scale * T is
rounded, so T could not be had from the prompt alone bit for bit.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from tpv import _base, errors, files
from tpv.errors import Invalid, InvalidTensor
from tpv.references import Reference
from tpv.vectors import Float32, TaskPromptVector, as_prompt

TaskType = Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"]

_CONFIG, _WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_EXPORT, _VECTOR, _INITIALIZATION = "tpv.json", "task_vector.safetensors", "initialization.safetensors"


class AdapterConfig(BaseModel):
    """What is taken from an `adapter_config.json`: plain facts; members that could load or run something are dropped.

    Every release of peft with prompt tuning knows what `write` sets here; older ones refuse members that they do not
    know (https://github.com/huggingface/peft/issues/2340).
    """

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: Literal["PROMPT_TUNING"]
    task_type: TaskType
    num_virtual_tokens: int = Field(ge=1, le=1_000_000)
    num_transformer_submodules: int | None = Field(default=None, ge=1, le=2)
    token_dim: int | None = Field(default=None, ge=1)
    base_model_name_or_path: str | None = Field(default=None, max_length=1024)
    revision: str | None = Field(default=None, max_length=256)
    prompt_tuning_init: str | None = Field(default=None, max_length=64)
    prompt_tuning_init_text: str | None = Field(default=None, max_length=10_000)
    tokenizer_name_or_path: str | None = Field(default=None, max_length=1024)
    inference_mode: bool | None = None
    peft_version: str | None = Field(default=None, max_length=64)

    @property
    def rows(self) -> int:
        """Rows of `prompt_embeddings`, dead ones included."""
        default = 2 if self.task_type == "SEQ_2_SEQ_LM" else 1
        return self.num_virtual_tokens * (self.num_transformer_submodules or default)


class _Export(BaseModel):
    """`tpv.json`: what `write` has written, so that `read` can tell it from what was changed since."""

    reference: str | None  #: of the version that was exported
    vector: str  #: fingerprint of T
    initialization: str  #: fingerprint of the P_init that T was added to
    scale: float
    prompt: str  #: fingerprint of P_init + scale * T


@dataclass(frozen=True)
class PeftPrompt:
    """A soft prompt from a PEFT directory."""

    tensor: Float32  #: (num_virtual_tokens, token_dim): the rows that PEFT's forward pass reads
    dead_rows: int  #: rows behind these in the file, left out
    config: AdapterConfig
    vector: TaskPromptVector | None = None  #: T itself, when `write` made the directory and its prompt is unchanged
    #: The version that `write` was given and the fingerprint of its P_init, even if the prompt was changed since.
    reference: str | None = None
    initialization: str | None = None


def read(directory: str | Path) -> PeftPrompt:
    """The soft prompt of a PEFT directory, dead rows left out.

    `adapter_model.bin` is read where there are no safetensors, without running anything; that needs torch.
    Raises InvalidTensor when there is no adapter, or several, or another one than prompt tuning, or its files do not
    fit together.
    """
    folder = _adapter_folder(Path(directory))
    config = _read_config(folder / _CONFIG)
    prompt = _read_prompt(folder)
    expected = (config.rows, config.token_dim or prompt.shape[1])
    if prompt.shape != expected:
        raise InvalidTensor(
            f"{folder}: the prompt is {list(prompt.shape)}, {_CONFIG} says {list(expected)}: "
            f"{config.num_virtual_tokens} virtual tokens of a {config.task_type} model"
        )
    if config.task_type == "CAUSAL_LM" and config.rows != config.num_virtual_tokens:
        raise InvalidTensor(f"{folder}: num_transformer_submodules is 2, but a CAUSAL_LM model is a single module")
    live = as_prompt(prompt[: config.num_virtual_tokens], "prompt")
    dead_rows = config.rows - config.num_virtual_tokens
    if (export := _read_export(folder)) is None:
        return PeftPrompt(live, dead_rows, config)
    vector = _read_vector(folder, export) if export.prompt == files.fingerprint(live) else None
    reference = str(Reference.parse(export.reference)) if export.reference is not None else None
    return PeftPrompt(live, dead_rows, config, vector, reference, export.initialization)


def write(
    directory: str | Path,
    vector: TaskPromptVector,
    initialization: ArrayLike,
    *,
    base_model: str,
    task_type: TaskType,
    revision: str | None = None,
    scale: float = 1.0,
    reference: str | None = None,
    allow_mixed_initializations: bool = False,
) -> Path:
    """Writes P_init + scale * T as a directory that `peft.PeftModel.from_pretrained(model, directory)` loads.

    `initialization` is P_init (r, d); another one than the vector's own only when that is asked for. `base_model` and
    `revision` go into the adapter's configuration, for people and for `peft.AutoPeftModel`. The directory appears whole
    or not at all; FileExistsError when something is there already (an empty directory may be). For a decoder-only model
    `task_type` is CAUSAL_LM, for an encoder-decoder SEQ_2_SEQ_LM.
    """
    start = as_prompt(initialization, "initialization")
    prompt = vector.apply(start, scale, allow_mixed_initializations=allow_mixed_initializations)
    config = _base.message(
        AdapterConfig,
        peft_type="PROMPT_TUNING",
        task_type=task_type,
        num_virtual_tokens=prompt.shape[0],
        num_transformer_submodules=1,  # PEFT's default for SEQ_2_SEQ_LM would want as many dead rows again
        token_dim=prompt.shape[1],
        base_model_name_or_path=base_model,
        revision=revision,
        prompt_tuning_init="RANDOM",  # TEXT would have PEFT load a tokenizer
        inference_mode=True,
    )
    export = _Export(
        reference=reference,
        vector=vector.fingerprint,
        initialization=files.fingerprint(start),
        scale=scale,
        prompt=files.fingerprint(prompt),
    )
    target = Path(directory).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{directory} is there already; give a directory that is new or empty")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        (partial / _CONFIG).write_text(_json(config))
        # PEFT's own files have this metadata too; some readers of safetensors insist on it.
        (partial / _WEIGHTS).write_bytes(files.dump({"prompt_embeddings": prompt}, {"format": "pt"}))
        (partial / _INITIALIZATION).write_bytes(files.dump({"prompt": start}))
        vector.save(partial / _VECTOR)
        (partial / _EXPORT).write_text(_json(export))
        partial.replace(target)  # takes the place of an empty directory; one that is no longer empty is an OSError
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # is not there any more when all went well
    return target


def task_type_of(architecture: str | None) -> TaskType:
    """Of a model class by its name; raises Invalid for one whose name does not tell."""
    if architecture and architecture.endswith("ForCausalLM"):
        return "CAUSAL_LM"
    if architecture and architecture.endswith("T5ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    raise Invalid(
        f"the registry knows the base model's architecture as {architecture or 'nothing'}: give its "
        "task_type (--task-type), CAUSAL_LM for a decoder-only model, SEQ_2_SEQ_LM for an encoder-decoder"
    )


def _adapter_folder(directory: Path) -> Path:
    """Where `adapter_config.json` lies: the directory itself, or its one sub-folder that has one."""
    if not directory.is_dir():
        raise InvalidTensor(f"{directory} is no directory; a PEFT adapter is one with {_CONFIG}")
    if (directory / _CONFIG).is_file():
        return directory
    found = sorted(path.parent for path in directory.glob(f"*/{_CONFIG}"))
    if not found:
        raise InvalidTensor(f"{directory} is no PEFT adapter: it has no {_CONFIG}, nor has any of its sub-folders")
    if len(found) > 1:
        raise InvalidTensor(f"{directory} holds several adapters; name one of: {', '.join(map(str, found))}")
    return found[0]


def _read_config(path: Path) -> AdapterConfig:
    found = _read_json(path)
    if found.get("peft_type") != "PROMPT_TUNING":
        raise InvalidTensor(
            f"{path}: this is a {found.get('peft_type')!r} adapter; only PROMPT_TUNING is a soft prompt of input "
            "embeddings"
        )
    try:
        return _base.message(AdapterConfig, **found)
    except errors.Invalid as error:
        raise InvalidTensor(f"{path}: {error}") from error


def _read_prompt(folder: Path) -> Float32:
    """`prompt_embeddings`, dead rows included."""
    path = folder / _WEIGHTS
    if not path.exists() and (folder / _PICKLED).exists():
        from tpv import torch_files

        return torch_files.read(folder / _PICKLED)
    if not path.exists():
        raise InvalidTensor(f"{folder} has no {_WEIGHTS}")
    try:
        tensors = files.read(path)
    except InvalidTensor as error:
        raise InvalidTensor(f"{path}: {error}") from error
    if set(tensors) != {"prompt_embeddings"}:
        raise InvalidTensor(
            f"{path}: a soft prompt is the one tensor prompt_embeddings; this file has {sorted(tensors) or 'none'}"
        )
    return as_prompt(tensors["prompt_embeddings"], "prompt")


def _read_export(folder: Path) -> _Export | None:
    """What `write` has noted in a directory that it made."""
    path = folder / _EXPORT
    if not path.exists():
        return None
    try:
        return _base.message(_Export, **_read_json(path))
    except errors.Invalid as error:
        raise InvalidTensor(f"{path}: {error}") from error


def _read_vector(folder: Path, export: _Export) -> TaskPromptVector:
    """T itself, beside a prompt that is still what was exported."""
    path = folder / _VECTOR
    if not path.exists():
        raise InvalidTensor(f"{path} is missing, which {_EXPORT} names; remove that too to import P alone")
    vector = TaskPromptVector.load(path)
    if vector.fingerprint != export.vector:
        raise InvalidTensor(f"{path} is not the vector that {_EXPORT} names; remove both to import P alone")
    return vector


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > files.HEADER_LIMIT:
        raise InvalidTensor(f"{path} has more than {files.HEADER_LIMIT} bytes; a few hundred would do")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidTensor(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidTensor(f"{path} is no JSON object")
    return found


def _json(model: BaseModel) -> str:
    return json.dumps(model.model_dump(exclude_unset=True), indent=2) + "\n"
