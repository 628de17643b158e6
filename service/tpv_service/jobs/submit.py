"""How a job comes to be: checked and resolved to versions and fingerprints, then queued in one transaction.

What a job needs, and what else it may say, follows from its method's entry in `tpv.methods.METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import numpy as np
from fastapi import Request
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
from tpv.presets import PRESETS, preset_options
from tpv.references import Reference
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.jobs import Center, JobCreate, JobSpec, ResolvedDataset, ResolvedInitialization
from tpv.schemas.similarity import Pool
from tpv_service.datasets.queries import resolve_dataset
from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import enqueue, resolved_vector, wait
from tpv_service.jobs.tables import JobRow, NeedRow
from tpv_service.queue import Queue
from tpv_service.registry.compatibility import check_same_initialization, label
from tpv_service.registry.queries import resolve_initialization, resolve_version, resolve_versions, vector_by_name
from tpv_service.registry.tables import BaseModelRow, InitializationRow, VersionRow
from tpv_service.search.queries import Query, choose
from tpv_service.search.scores import center_of

_COMMON = frozenset({"method", "options", "seed", "queue", "priority", "min_memory", "needs", "description", "tags"})


async def resolve_job(http: Request, session: AsyncSession, request: JobCreate) -> tuple[JobSpec, list[JobSpec]]:
    """What the job is to do, all references resolved, and what has to be done first: tunings of target and sources.

    Refuses what would fail later. Reads alone, and gives the connection back where it waits, so it comes before the
    first write of a transaction.
    """
    method = _method(request.method)
    _check_members(method, request)
    if method.result == "initialization":
        return _initialize_spec(request, _options(method, request.options)), []

    sources = await _sources(session, request)
    found_sources = [source for source in sources if isinstance(source, VersionRow)]
    target = await _target(session, request.target) if request.target else None
    version = target if isinstance(target, VersionRow) else None
    target_name = _name_of(target) if target else None
    _check_sources(sources, target_name)
    initialization = await _initialization(session, request, [*found_sources, *([version] if version else [])])

    dataset, rows = await _dataset(session, str(request.dataset), request.shots)
    together = method.datasets == "together"
    found = [await _dataset(session, ref, request.shots if together else None) for ref in request.datasets or ()]
    further = [resolved for resolved, _ in found]
    _check_datasets(method, dataset, further, sources)

    output = _output(request.output) if request.output else None
    if output is not None:
        if output.path == target_name:
            raise Invalid(f"the result needs a name of its own: {target_name} is the target's; set `output` to another")
        await _check_output(session, output, tasks_of(method, dataset, further), request.task_type)
    if isinstance(target, Reference):
        await _check_output(session, target, [task_of(dataset)], request.task_type)
    unmade = {source.path: at for at, source in enumerate(sources) if isinstance(source, Reference)}
    prepared = {path: await _dataset(session, _prepare(request)[path], None) for path in unmade}
    for path, (of_source, _) in prepared.items():
        await _check_output(session, Reference.parse(path), [task_of(of_source)], None)

    model = initialization.base_model
    few_shot = request.shots is not None
    all_rows = rows + (sum(more for _, more in found) if together else 0)
    preset = _preset(request, method, model, all_rows, few_shot)
    options = _options(method, preset | request.options)
    if request.reference_pool is not None and not options["center"]:
        raise Invalid("reference_pool belongs to the option `center`, which is off")
    query = Query(
        label=target_name or "the target",
        pooled=np.zeros(initialization.token_dim, dtype=np.float32),  # nothing is compared with it
        initialization=initialization,
        versions=[version] if version else [],
        task=task_of(dataset),
    )
    spec = _spec(
        request,
        BaseModelReference(id=model.name, revision=model.revision, unpinned=model.unpinned),
        options,
        output,
        preset=request.preset,
        base_model_facts=BaseModelFacts(
            digest=model.digest,
            embedding_digest=model.embedding_digest,
            architecture=model.architecture,
            token_dim=model.token_dim,
        ),
        initialization=_resolved_initialization(initialization),
        dataset=dataset,
        datasets=further,
        target=resolved_vector(version) if version else None,
        target_name=target_name,
        sources=[resolved_vector(source) for source in found_sources],
        unmade_sources=unmade,
        center=await _center(http, session, query, request.reference_pool) if options.get("center") else None,
    )
    tuning, first = METHODS["prompt-tuning"], []
    if isinstance(target, Reference):
        given = _preset(request, tuning, model, rows, few_shot) | (request.target_options or {})
        first.append(_tuning(spec, _options(tuning, given, "target_options"), target.path, dataset))
    for path, (of_source, count) in prepared.items():  # of all rows: the shots are the target's
        given = _preset(request, tuning, model, count, few_shot=False) | (request.target_options or {})
        own = _tuning(spec, _options(tuning, given, "target_options"), path, of_source)
        first.append(own.model_copy(update={"shots": None, "shot_seed": 0, "task_type": None}))
    return spec, first


async def submit_job(
    session: AsyncSession, queue: Queue, request: JobCreate, spec: JobSpec, first: Sequence[JobSpec], actor: str
) -> JobRow:
    """Makes the resolved job, and those that it needs first; one like these that is on its way already is shared."""
    like = [await queries.live_job_like(session, tuning.model_dump(mode="json")) for tuning in first]
    locked = await queries.lock_jobs(session, {*(request.needs or ()), *(shared for shared in like if shared)})
    needs = [_checked_need(locked.get(need), need) for need in dict.fromkeys(request.needs or ())]
    for tuning, shared in zip(first, like, strict=True):
        found = locked.get(shared) if shared else None
        if found is None or found.state not in queries.LIVE:  # there is none, or it has just ended
            found = await _create(session, queue, request, actor, tuning, prepares=True)
        if found not in needs:
            needs.append(found)
    return await _create(session, queue, request, actor, spec, needs=needs)


def _checked_need(job: JobRow | None, asked: UUID) -> JobRow:
    if job is None:
        raise NotFound(f"there is no job {asked}, which `needs` names; see: tpv job list", reference=str(asked))
    if job.state in queries.LOST:
        raise Conflict(f"job {job.id}, which `needs` names, is {job.state}; retry it first: tpv job retry {job.id}")
    return job


async def _create(
    session: AsyncSession,
    queue: Queue,
    request: JobCreate,
    actor: str,
    spec: JobSpec,
    *,
    needs: Sequence[JobRow] = (),
    prepares: bool = False,
) -> JobRow:
    output = Reference.parse(spec.output) if spec.output else None
    job = JobRow(
        method=spec.method,
        spec=spec.model_dump(mode="json"),
        output_namespace=output and output.namespace,
        output_name=output and output.name,
        queue=request.queue,
        priority=request.priority,
        min_memory=request.min_memory,
        prepares=prepares,
        attempt=0,
        lost=0,
        progress={},
        metrics={},
        state="queued",
        actor=actor,
    )
    session.add(job)
    await session.flush()
    session.add_all(NeedRow(job_id=job.id, needs_id=need.id) for need in needs)
    if waits_for := [str(need.id) for need in needs if need.state != "succeeded"]:
        wait(session, job, f"waits for job {', '.join(waits_for)}")
    else:
        await enqueue(session, queue, job)
    await session.flush()
    return await queries.job_by_id(session, job.id)


# --- Specifications --------------------------------------------------------------------------------------------------


def _initialize_spec(request: JobCreate, options: dict[str, Any]) -> JobSpec:
    model = request.base_model
    assert model is not None  # _check_members
    if not (model.revision or model.unpinned or model.id.startswith("/")):
        raise Invalid(
            f"base model {model.id!r} needs a revision (a commit, which never changes); to take whatever is there now, "
            "say unpinned: true"
        )
    return _spec(request, model, options, _output(request.output) if request.output else None)


def _tuning(transfer: JobSpec, options: dict[str, Any], output: str, dataset: ResolvedDataset) -> JobSpec:
    """The prompt tuning that makes a vector which the transfer needs: the target's own, or a source."""
    return transfer.model_copy(
        update={
            "method": "prompt-tuning",
            "options": options,
            "output": output,
            "dataset": dataset,
            "datasets": [],
            "target": None,
            "target_name": None,
            "sources": [],
            "unmade_sources": {},
            "center": None,
            "description": None,
            "tags": {},
        }
    )


def _spec(
    request: JobCreate,
    base_model: BaseModelReference,
    options: dict[str, Any],
    output: Reference | None,
    **resolved: Any,
) -> JobSpec:
    return JobSpec(
        method=request.method,
        options=options,
        output=output.path if output else None,
        base_model=base_model,
        shots=request.shots,
        shot_seed=request.shot_seed,
        seed=request.seed,
        task_type=request.task_type,
        description=request.description,
        tags=request.tags,
        **resolved,
    )


def task_of(dataset: ResolvedDataset) -> str:
    """The task of a vector that was tuned on this data set: its reference without version, `cr` for `default/cr:1`."""
    return Reference.parse(dataset.reference).path.removeprefix("default/")


def tasks_of(method: Method, dataset: ResolvedDataset, further: Sequence[ResolvedDataset]) -> list[str]:
    """The tasks of the vector that the method makes of these data sets, in the order of their names."""
    together = further if method.datasets == "together" else ()
    return sorted(map(task_of, (dataset, *together)))


async def _center(http: Request, session: AsyncSession, query: Query, pool: Pool | None) -> Center:
    """The mean pooled vector of the reference pool, in which nothing is of the target's task or made from it."""
    candidates = await choose(http, session, query, pool or Pool(), allow_same_task=False)
    mean = await center_of(candidates, "center")
    return Center(vector=mean.tolist(), size=candidates.size, rule=candidates.rule)


# --- Checks ----------------------------------------------------------------------------------------------------------


def _method(name: str) -> Method:
    if name not in METHODS:
        raise InvalidOptions(f"there is no method {name!r}; use one of {', '.join(METHODS)}", allowed=[*METHODS])
    return METHODS[name]


def _check_members(method: Method, request: JobCreate) -> None:
    """Each method has members that it needs and such that would mean nothing: saying them is an error."""
    if method.result == "initialization":
        needed, optional = {"base_model"}, {"output"}
    else:
        needed = {"dataset", "sources" if method.sources else "initialization"}
        optional = {"initialization", "preset", "shots", "shot_seed"}
        if method.result == "vector":
            needed.add("output")
            optional.add("task_type")
        if method.sources:
            optional.add("prepare")
        if method.target:
            needed.add("target")
        if method.target or request.prepare:
            optional.add("target_options")
        if method.datasets == "together" and method.sources:
            optional.add("datasets")
        elif method.datasets:  # without sources, only several tasks make the method more than prompt tuning
            needed.add("datasets")
        if "center" in method.options.model_fields:
            optional.add("reference_pool")
    given = {name for name in request.model_fields_set if getattr(request, name) is not None}
    if missing := sorted(needed - given):
        raise Invalid(f"a job of the method {method.name} needs {', '.join(missing)}", missing=missing)
    if superfluous := sorted(given - needed - optional - _COMMON):
        raise Invalid(f"a job of the method {method.name} takes no {', '.join(superfluous)}", superfluous=superfluous)


def _options(method: Method, values: Mapping[str, Any], member: str = "options") -> dict[str, Any]:
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


def _preset(request: JobCreate, method: Method, model: BaseModelRow, rows: int, few_shot: bool) -> dict[str, Any]:
    """What the preset says of the method, for a training on so many rows."""
    if request.preset is None:
        return {}
    try:
        return preset_options(
            request.preset, method.name, model.architecture, model.token_dim, train_rows=rows, few_shot=few_shot
        )
    except ValueError as error:
        raise InvalidOptions(f"preset: {error}", allowed=[*PRESETS]) from error


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


def _prepare(request: JobCreate) -> dict[str, str]:
    """The data sets that missing sources are tuned on, by the full names of these."""
    return {Reference.parse(name).path: dataset for name, dataset in (request.prepare or {}).items()}


async def _sources(session: AsyncSession, request: JobCreate) -> list[VersionRow | Reference]:
    """The sources' versions; of those that `prepare` names and that have none yet, the names."""
    asked, prepare = request.sources or [], _prepare(request)
    names = {text: Reference.parse(text) for text in asked}
    if unknown := sorted(prepare.keys() - {name.path for name in names.values() if name.name}):
        raise Invalid(f"`prepare` names {', '.join(unknown)}, which is no source of this job")
    missing = {
        text: name
        for text, name in names.items()
        if name.name and name.path in prepare and isinstance(await _target(session, text), Reference)
    }
    found = await resolve_versions(session, [text for text in asked if text not in missing]) if asked else []
    versions = iter(found)
    return [missing.get(text) or next(versions) for text in asked]


def _name_of(target: VersionRow | Reference) -> str:
    return target.path if isinstance(target, Reference) else f"{target.vector.namespace}/{target.vector.name}"


def _check_sources(sources: Sequence[VersionRow | Reference], target_name: str | None) -> None:
    for source in sources:
        if _name_of(source) == target_name:
            raise Invalid(f"{target_name} is the target; it cannot be a source of itself too")
    references = [s.path if isinstance(s, Reference) else resolved_vector(s).reference for s in sources]
    if twice := sorted({reference for reference in references if references.count(reference) > 1}):
        raise Invalid(f"a source is named twice: {', '.join(twice)}")


async def _initialization(
    session: AsyncSession, request: JobCreate, versions: Sequence[VersionRow]
) -> InitializationRow:
    """The initialization that is asked for and that the vectors have; raises IncompatibleVectors where these differ."""
    asked = await resolve_initialization(session, request.initialization) if request.initialization else None
    if versions:
        check_same_initialization(versions)
    common = versions[0].initialization if versions else asked
    if common is None:  # no source is there yet, and without sources _check_members asks for it
        raise Invalid("none of the vectors is there yet: name the `initialization` that they are tuned from")
    if asked is not None and asked.id != common.id:
        raise IncompatibleVectors(
            f"the sources' initialization is {label(common)}, the one asked for {label(asked)}",
            differences={"fingerprint": [common.fingerprint, asked.fingerprint]},
        )
    return common


async def _dataset(session: AsyncSession, reference: str, shots: int | None) -> tuple[ResolvedDataset, int]:
    """The data set, and how many of its rows are trained on."""
    row = await resolve_dataset(session, reference)
    train = next((split.rows for split in row.splits if split.name == "train"), 0)
    if train < (shots or 1):
        raise InvalidDataset(f"data set {reference} has {train} rows in the split train; {shots or 1} needed")
    resolved = ResolvedDataset(
        reference=f"{row.dataset.namespace}/{row.dataset.name}:{row.number}",
        dataset_id=row.id,
        fingerprint=row.fingerprint,
    )
    return resolved, shots or train


def _check_datasets(
    method: Method,
    dataset: ResolvedDataset,
    further: Sequence[ResolvedDataset],
    sources: Sequence[VersionRow | Reference],
) -> None:
    if method.datasets == "sources" and len(further) != len(sources):
        raise Invalid(
            f"{method.name} reads the sources' own data: name one data set for each source, in their order, as "
            f"`datasets`; there are {len(sources)} sources and {len(further)} data sets"
        )
    tasks = tasks_of(method, dataset, further)
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise Invalid(f"a data set is named twice: {', '.join(twice)}")


async def _check_output(session: AsyncSession, output: Reference, tasks: list[str], task_type: str | None) -> None:
    """Refuses at once what would be refused after hours of training: a name that cannot take the result."""
    try:
        vector = await vector_by_name(session, output.namespace, str(output.name), deleted=True)
    except NotFound:
        return
    if vector.deleted_at:
        raise Conflict(f"vector {output.path} was deleted; bring it back: tpv vector restore {output.path}")
    if vector.tasks != tasks:
        raise Conflict(
            f"{output.path} is of task {', '.join(vector.tasks) or '(none)'}, the job's is {', '.join(tasks)}; "
            "use another name for the result",
            differences={"task": [vector.tasks, tasks]},
        )
    if task_type and task_type != vector.task_type:
        raise Conflict(
            f"{output.path} is of task type {vector.task_type}, not {task_type}; use another name",
            differences={"task_type": [vector.task_type, task_type]},
        )


def _resolved_initialization(row: InitializationRow) -> ResolvedInitialization:
    return ResolvedInitialization(
        reference=label(row),
        initialization_id=row.id,
        fingerprint=row.fingerprint,
    )
