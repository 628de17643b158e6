# Generated from client/tpv/_async/initializations.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.initializations`: the soft prompts that tuning starts from."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from tpv import _base, _content, _paths, files
from tpv._sync.http import Http
from tpv._sync.jobs import Jobs
from tpv._base import Call
from tpv._paths import InitializationLike
from tpv.schemas.initializations import (
    BaseModel,
    BaseModelFacts,
    BaseModelReference,
    Initialization,
    InitializationCreate,
)
from tpv.vectors import Float32, as_prompt


class Initializations:
    """`client.initializations`: the soft prompts that tuning starts from; immutable, known by their fingerprint."""

    def __init__(self, http: Http, jobs: Jobs) -> None:
        self._http, self._jobs = http, jobs

    def create(
        self,
        name: str | None = None,
        *,
        base_model: str | BaseModelReference,
        revision: str | None = None,
        unpinned: bool = False,
        tensor: NDArray[Any] | Any | None = None,
        base_model_facts: BaseModelFacts | None = None,
        seed: int = 0,
        timeout: float | None = None,  # noqa: ASYNC109 # the job goes on after it
        progress: bool = False,
        **options: Any,
    ) -> Initialization:
        """Uploads the tensor (r, d), or has a worker draw one from the base model and waits for it.

        Without a tensor, `options` are those of the `initialize` method: num_virtual_tokens, strategy, top_k, range,
        text; `timeout` is in seconds. The same tensor for the same base model is one initialization, whoever makes it.
        """
        if tensor is None:
            job = self._jobs.initialize(
                name, base_model=base_model, revision=revision, unpinned=unpinned, seed=seed, **options
            )
            job.wait(timeout, progress=progress)
            namespace, _ = _paths.split_output(name, "initialization")
            result = job.result or ""  # an id, or namespace/name
            found = self.get(result if "/" in result else f"{namespace}/{result}")
            return found.model_copy(update={"created": bool(job.result_created)})
        if options or seed:
            names = ", ".join([*options, *(["seed"] if seed else [])])
            raise TypeError(f"an uploaded tensor was drawn already; leave out: {names}")
        prompt = as_prompt(_content.as_array(tensor), "initialization")
        namespace, short = _paths.split_output(name, "initialization")
        members = _base.given(name=short, namespace=namespace, base_model_facts=base_model_facts)
        metadata = _base.message(
            InitializationCreate,
            base_model=_base.base_model(base_model, revision, unpinned),
            fingerprint=files.fingerprint(prompt),
            **members,
        )
        content = files.dump({"prompt": prompt})
        with _content.transfer(f"uploading {name or 'initialization'}", len(content), progress) as advance:
            upload = _content.Upload(_content.open_upload(content), advance)
            call = Call(
                method="POST",
                path="/initializations",
                form={"metadata": metadata.model_dump_json(exclude_unset=True)},
                parts={"file": ("prompt.safetensors", upload, _content.SAFETENSORS)},
                headers=_base.new_key(),
            )
            return self._http.ask(Initialization, call)

    def get(self, ref: InitializationLike) -> Initialization:
        """One initialization, by name, id or fingerprint."""
        return self._http.get(Initialization, _paths.initialization_path(ref))

    def load(self, ref: InitializationLike) -> Float32:
        """The soft prompt P_init, float32 (r, d), verified against its fingerprint."""
        found = ref if isinstance(ref, Initialization) else self.get(ref)
        path = _paths.initialization_path(found) + "/content"
        content = self._http.download(path, _content.Sink(), expected=found.digest)
        return _content.tensor_of(content, "prompt", found.fingerprint)

    def base_models(self) -> builtins.list[BaseModel]:
        """The base models that initializations belong to."""
        return [model for model in self._http.pages(BaseModel, "/base-models", {})]

    def list(
        self, *, namespace: str | None = None, base_model: str | None = None, page_size: int | None = None
    ) -> Iterator[Initialization]:
        """The initializations that pass the filters, fetched a page at a time."""
        params = {"namespace": namespace, "base_model": base_model, "limit": page_size}
        return self._http.pages(Initialization, "/initializations", params)
