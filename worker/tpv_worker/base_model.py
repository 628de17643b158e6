"""The base model of an attempt: where it lies, what it is, and a process that holds it for the attempts of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv_worker import lab
from tpv_worker.backbone import Backbone, model_digest
from tpv_worker.errors import ModelError
from tpv_worker.settings import Settings


class LoadedModel:
    """The base model in a process that attempts are forked from: on the CPU, and in the threads of nobody.

    What goes wrong with it is raised in the attempt that asks for it.
    """

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
        disable_progress_bar()  # type: ignore[no-untyped-call] # it has a thread too
        self.settings = settings
        self._files: object = None
        self._loaded: tuple[Backbone, BaseModelFacts] | Exception

    def load(self, model: BaseModelReference) -> None:
        """Loads it, unless it is there already and its files have not changed."""
        try:
            where = locate_model(model, self.settings.model_directories)
            files = files_of(where, model.revision)
            if files is None or files != self._files:
                self._files = None
                backbone = Backbone.load(where, revision=model.revision)
                self._loaded = backbone, facts_of(backbone, where, model.revision)
                self._files = files
        except Exception as error:
            self._loaded, self._files = error, None

    def get(self) -> tuple[Backbone, BaseModelFacts]:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def locate_model(model: BaseModelReference, allowed: Sequence[Path]) -> str:
    """The lab's own model, a directory that the operator allows, or a hub id; else raises ModelError."""
    if model.id == lab.BASE_MODEL:
        return str(lab.MODEL_DIRECTORY)
    path = Path(model.id)
    if not path.is_absolute():
        if path.exists():
            raise ModelError(
                f"{model.id!r} is read as a hub id, but the worker finds a file of that name where it runs"
            )
        return model.id
    resolved = path.resolve()
    if not any(resolved.is_relative_to(directory.resolve()) for directory in allowed):
        raise ModelError(
            f"the worker may not read {model.id}: its operator allows "
            f"{', '.join(map(str, allowed)) or 'no directories'} (TPV_MODEL_DIRECTORIES)"
        )
    return str(resolved)


def files_of(where: str, revision: str | None) -> object:
    """What tells whether a model is still what it was; None when nothing does: a branch of the hub may move."""
    if Path(where).is_dir():
        return sorted((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in Path(where).iterdir())
    return revision if revision and len(revision) == 40 else None


def facts_of(backbone: Backbone, where: str, revision: str | None) -> BaseModelFacts:
    """What is read off a loaded model; of a hub model the files are where the download has put them."""
    config = cached_file(where, "config.json", revision=revision)
    return BaseModelFacts(
        digest=model_digest(Path(str(config)).parent),
        embedding_digest=backbone.embedding_digest(),
        architecture=type(backbone.model).__name__,
        token_dim=backbone.token_dim,
    )


def check_facts(model: BaseModelReference, *, expected: BaseModelFacts | None, found: BaseModelFacts) -> None:
    """Raises ModelError when the model is not the one that the initialization belongs to."""
    known = expected.model_dump(exclude_none=True) if expected else {}
    if different := sorted(name for name, value in known.items() if getattr(found, name) != value):
        raise ModelError(
            f"{model.id} is not the model that the initialization was made for: it differs in "
            + ", ".join(f"{name} ({getattr(found, name)}, not {known[name]})" for name in different)
        )
