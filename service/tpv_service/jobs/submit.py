"""How a job comes to be: checked, resolved to versions and fingerprints, and queued, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import (
    Conflict,
    IncompatibleVectors,
    Invalid,
    InvalidDataset,
    InvalidOptions,
    InvalidReference,
    NotFound,
)
from tpv.methods import METHODS, Method
from tpv.references import Reference
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.jobs import JobCreate, JobSpec, ResolvedDataset, ResolvedInitialization, ResolvedVector
from tpv_service.datasets.queries import resolve_dataset
from tpv_service.datasets.tables import DatasetVersionRow
from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import enqueue, resolved_vector, show
from tpv_service.jobs.tables import JobRow, NeedRow
from tpv_service.queue import Queue
from tpv_service.registry.compatibility import check_same_initialization
from tpv_service.registry.queries import resolve_initialization, resolve_version, vector_by_name
from tpv_service.registry.tables import InitializationRow, VersionRow

_COMMON = frozenset({"method", "options", "seed", "queue", "priority", "description", "tags"})
_TRAINING = frozenset({"shots", "shot_seed", "task_type"})


async def submit_job(session: AsyncSession, queue: Queue, request: JobCreate, actor: str) -> JobRow:
    """Makes the job, and the one that it needs first where there is one."""
    method = _method(request.method)
    options = _options(method, request.options, "options")
    if method.result == "initialization":
        _check_members(request, needed={"base_model"}, optional={"output"})
        return await _create(session, queue, request, actor, _initialize_spec(request, options))
    if not method.transfers:
        _check_members(request, needed={"initialization", "dataset", "output"}, optional=_TRAINING)
        return await _create(session, queue, request, actor, await _tuning_spec(session, request, options))
    _check_members(
        request,
        needed={"target", "sources", "dataset", "output"},
        optional=_TRAINING | {"target_options", "initialization"},
    )
    spec = await _transfer_spec(session, request, options)
    if spec.target is not None:
        return await _create(session, queue, request, actor, spec)
    first = await _target_job(session, queue, request, actor, spec)
    return await _create(session, queue, request, actor, spec, needs=first)


async def _create(
    session: AsyncSession, queue: Queue, request: JobCreate, actor: str, spec: JobSpec, *, needs: JobRow | None = None
) -> JobRow:
    output = Reference.parse(spec.output) if spec.output else None
    job = JobRow(
        method=spec.method,
        spec=spec.model_dump(mode="json"),
        output_namespace=output and output.namespace,
        output_name=output and output.name,
        queue=request.queue,
        priority=request.priority,
        attempt=0,
        progress={},
        metrics={},
        state="queued",
        actor=actor,
    )
    session.add(job)
    await session.flush()
    if needs is None:
        await enqueue(session, queue, job)
    else:
        session.add(NeedRow(job_id=job.id, needs_id=needs.id))
        show(session, job, "queued", "waiting", f"waits for job {needs.id}, which tunes {spec.target_name}")
    await session.flush()
    return await queries.job_by_id(session, job.id)


async def _target_job(session: AsyncSession, queue: Queue, request: JobCreate, actor: str, transfer: JobSpec) -> JobRow:
    """The prompt tuning that makes the target's own vector; one that is on its way already is shared."""
    method = METHODS["prompt-tuning"]
    spec = transfer.model_copy(
        update={
            "method": method.name,
            "options": _options(method, request.target_options or {}, "target_options"),
            "output": transfer.target_name,
            "target_name": None,
            "sources": [],
            "description": None,
            "tags": {},
        }
    )
    shared = await queries.lock_live_job(session, spec.model_dump(mode="json"))
    return shared or await _create(session, queue, request, actor, spec)


# --- Specifications --------------------------------------------------------------------------------------------------


def _initialize_spec(request: JobCreate, options: dict[str, Any]) -> JobSpec:
    model = request.base_model
    assert model is not None  # _check_members
    if not (model.revision or model.unpinned or model.id.startswith("/")):
        raise Invalid(
            f"base model {model.id!r} needs a revision (a commit, which never changes); to take whatever is there now, "
            "say unpinned: true"
        )
    output = _output(request.output) if request.output else None
    return _spec(request, options, output, model)


async def _tuning_spec(session: AsyncSession, request: JobCreate, options: dict[str, Any]) -> JobSpec:
    initialization = await resolve_initialization(session, str(request.initialization))
    dataset = await _dataset(session, request)
    output = _output(str(request.output))
    await _check_output(session, output, dataset, request)
    return _spec(
        request,
        options,
        output,
        *_model_of(initialization),
        initialization=_resolved_initialization(initialization),
        dataset=dataset,
    )


async def _transfer_spec(session: AsyncSession, request: JobCreate, options: dict[str, Any]) -> JobSpec:
    sources = [await resolve_version(session, reference) for reference in request.sources or ()]
    target = await _target(session, str(request.target))
    check_same_initialization([*sources, *([target] if isinstance(target, VersionRow) else [])])
    initialization = sources[0].initialization
    if request.initialization is not None:
        await _check_initialization(session, request.initialization, initialization)
    target_name = target.path if isinstance(target, Reference) else f"{target.vector.namespace}/{target.vector.name}"
    output = _output(str(request.output))
    if output.path == target_name:
        raise Invalid(f"the result needs a name of its own: {target_name} is the target's; set `output` to another")
    _check_sources(sources, target_name)
    dataset = await _dataset(session, request)
    await _check_output(session, output, dataset, request)
    resolved: ResolvedVector | None = None
    if isinstance(target, VersionRow):
        resolved = resolved_vector(target)
    else:
        await _check_output(session, target, dataset, request)
    return _spec(
        request,
        options,
        output,
        *_model_of(initialization),
        initialization=_resolved_initialization(initialization),
        dataset=dataset,
        target=resolved,
        target_name=target_name,
        sources=[resolved_vector(source) for source in sources],
    )


def _spec(
    request: JobCreate,
    options: dict[str, Any],
    output: Reference | None,
    base_model: BaseModelReference,
    base_model_facts: BaseModelFacts | None = None,
    **resolved: Any,
) -> JobSpec:
    return JobSpec(
        method=request.method,
        options=options,
        output=output.path if output else None,
        base_model=base_model,
        base_model_facts=base_model_facts,
        shots=request.shots,
        shot_seed=request.shot_seed,
        seed=request.seed,
        task_type=request.task_type,
        description=request.description,
        tags=request.tags,
        **resolved,
    )


def task_of(dataset: str) -> str:
    """The task of a vector that was tuned on this data set: its reference without version, `cr` for `default/cr:1`."""
    reference = Reference.parse(dataset)
    return reference.path.removeprefix("default/")


# --- Checks ----------------------------------------------------------------------------------------------------------


def _method(name: str) -> Method:
    if name not in METHODS:
        raise InvalidOptions(f"there is no method {name!r}; use one of {', '.join(METHODS)}", allowed=[*METHODS])
    return METHODS[name]


def _options(method: Method, values: Mapping[str, Any], member: str) -> dict[str, Any]:
    """All options of the method, defaults filled in."""
    try:
        return method.options.model_validate(values).model_dump(mode="json")
    except ValidationError as error:
        allowed = sorted(method.options.model_fields)
        wrong = [
            {"where": ".".join([member, *map(str, e["loc"])]), "what": e["msg"]}
            for e in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidOptions(
            "; ".join(f"{e['where']}: {e['what']}" for e in wrong[:3])
            + f"; the options of {method.name} are {', '.join(allowed)}",
            errors=wrong,
            allowed=allowed,
        ) from error


def _check_members(request: JobCreate, *, needed: Set[str], optional: Set[str]) -> None:
    """Each method has members that it needs and such that would mean nothing: saying them is an error."""
    given = {name for name in request.model_fields_set if getattr(request, name) is not None}
    if missing := sorted(needed - given):
        raise Invalid(f"a {request.method} job needs {', '.join(missing)}", missing=missing)
    if superfluous := sorted(given - needed - optional - _COMMON):
        raise Invalid(f"a {request.method} job takes no {', '.join(superfluous)}", superfluous=superfluous)


def _output(text: str) -> Reference:
    reference = Reference.parse(text)
    if reference.name is None or reference.selector:
        raise InvalidReference(f"{text!r}: `output` is a name, [namespace/]name; its version is made by the job")
    return reference


async def _target(session: AsyncSession, text: str) -> VersionRow | Reference:
    """The target's version, or its name when no version of that name exists yet."""
    reference = Reference.parse(text)
    try:
        return await resolve_version(session, text)
    except NotFound:
        if reference.name is None or reference.selector:
            raise
        return reference


def _check_sources(sources: Sequence[VersionRow], target_name: str) -> None:
    for source in sources:
        if f"{source.vector.namespace}/{source.vector.name}" == target_name:
            raise Invalid(f"{target_name} is the target; it cannot be a source of itself too")
    references = [resolved_vector(source).reference for source in sources]
    if twice := sorted({reference for reference in references if references.count(reference) > 1}):
        raise Invalid(f"a source is named twice: {', '.join(twice)}")


async def _check_initialization(session: AsyncSession, text: str, common: InitializationRow) -> None:
    asked = await resolve_initialization(session, text)
    if asked.id != common.id:
        raise IncompatibleVectors(
            f"the sources' initialization is {common.name or common.id}, the one asked for {asked.name or asked.id}",
            differences={"fingerprint": [common.fingerprint, asked.fingerprint]},
        )


async def _dataset(session: AsyncSession, request: JobCreate) -> ResolvedDataset:
    row = await resolve_dataset(session, str(request.dataset))
    train = next((split.rows for split in row.splits if split.name == "train"), 0)
    if train < (request.shots or 1):
        raise InvalidDataset(
            f"data set {request.dataset} has {train} rows in the split train; {request.shots or 1} needed"
        )
    return ResolvedDataset(reference=_dataset_reference(row), dataset_id=row.id, fingerprint=row.fingerprint)


def _dataset_reference(row: DatasetVersionRow) -> str:
    return f"{row.dataset.namespace}/{row.dataset.name}:{row.number}"


async def _check_output(session: AsyncSession, output: Reference, dataset: ResolvedDataset, request: JobCreate) -> None:
    """Refuses at once what would be refused after hours of training: a name that cannot take the result."""
    try:
        vector = await vector_by_name(session, output.namespace, str(output.name), deleted=True)
    except NotFound:
        return
    if vector.deleted_at:
        raise Conflict(f"vector {output.path} was deleted; bring it back: tpv vector restore {output.path}")
    task = task_of(dataset.reference)
    if vector.tasks != [task]:
        raise Conflict(
            f"{output.path} is of task {', '.join(vector.tasks) or '(none)'}, the job's is {task}; "
            "use another name for the result",
            differences={"task": [vector.tasks, [task]]},
        )
    if request.task_type and request.task_type != vector.task_type:
        raise Conflict(
            f"{output.path} is of task type {vector.task_type}, not {request.task_type}; use another name",
            differences={"task_type": [vector.task_type, request.task_type]},
        )


def _model_of(initialization: InitializationRow) -> tuple[BaseModelReference, BaseModelFacts]:
    model = initialization.base_model
    return (
        BaseModelReference(id=model.name, revision=model.revision, unpinned=model.unpinned),
        BaseModelFacts(
            digest=model.digest,
            embedding_digest=model.embedding_digest,
            architecture=model.architecture,
            token_dim=model.token_dim,
        ),
    )


def _resolved_initialization(row: InitializationRow) -> ResolvedInitialization:
    return ResolvedInitialization(
        reference=f"{row.namespace}/{row.name}" if row.name else str(row.id),
        initialization_id=row.id,
        fingerprint=row.fingerprint,
    )
