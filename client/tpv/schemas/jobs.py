"""Jobs on the wire: what users ask for and follow, and what workers report."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import ByteSize, Field

from tpv.schemas.base import Answer, Name, Request, Tags
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.similarity import Pool
from tpv.schemas.vectors import Evaluation, EvaluationCreate

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})

Reason = Literal[
    "waiting", "worker-lost", "killed", "unavailable", "drained", "out-of-memory", "nan-loss", "data", "model",
    "options", "verification", "timeout", "dependency", "conflict", "cancelled", "crashed",
]  # fmt: skip
#: No fault of the job, which is tried again: its worker fell silent, its process died by a signal, the service or the
#: store did not answer, or the worker was asked to stop. Every other reason ends the job.
RETRIED: frozenset[Reason] = frozenset({"worker-lost", "killed", "unavailable", "drained"})


class JobCreate(Request):
    """A piece of work for the workers. `method` names an entry of `tpv.methods.METHODS`, `options` are its options.

    What else is needed follows from that entry; a member that the method has no use for is refused.

    - `initialize`: `base_model`; `output` is the initialization's name (optional).
    - All others: `dataset`, and `initialization` unless there are `sources`, whose it is then.
    - A method whose result is a vector: `output`.
    - A method with sources: `sources`. One that starts from the target's own vector: `target`; when that has no version
      yet, its own prompt tuning (with `target_options`) is submitted first and the job waits for it.
    - A method of several data sets: `datasets`, beside `dataset`: further tasks that are trained together with it, or
      one data set for each of the sources, in their order.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    output: str | None = Field(None, description="[namespace/]name that the result is registered under.")
    base_model: BaseModelReference | None = None
    initialization: str | None = None
    dataset: str | None = None
    datasets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=63,  # a vector names 64 tasks at most
        description="Further data sets, beside `dataset`.",
    )
    target: str | None = None
    target_options: dict[str, Any] | None = None
    sources: list[str] | None = Field(None, min_length=1, max_length=1000)
    prepare: dict[str, str] | None = Field(
        None,
        max_length=1000,
        description="Sources that have no version yet, and the data set that each is tuned on first, with "
        "`target_options` and all its rows; this job waits for them.",
    )
    needs: list[UUID] | None = Field(None, max_length=1000, description="Jobs that must succeed first.")
    preset: str | None = Field(
        None, description="Options of a paper for the model's family (`tpv.presets`); what `options` say comes first."
    )
    reference_pool: Pool | None = Field(
        None,
        description="For the option `center`: the vectors whose mean is subtracted. Default: the newest version of "
        "each vector of the initialization. The target, and vectors of its task or made from it, are left out.",
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="Training rows overall, class proportions kept; none: all. Of each data set that is trained "
        "together with others; data sets of sources are read whole.",
    )
    shot_seed: int = Field(0, ge=0, lt=2**63)
    seed: int = Field(0, ge=0, lt=2**63)
    queue: Name = "default"
    priority: int = Field(0, ge=-1000, le=1000)
    min_memory: ByteSize | None = Field(
        None, ge=1, lt=2**63, description="Of the worker's device: bytes, or a text such as 24GB (10^9) or 24GiB."
    )
    task_type: str | None = Field(None, max_length=128)
    description: str | None = Field(None, max_length=10_000)
    tags: Tags = Field(default_factory=dict)


class JobRetry(Request):
    """A failed or cancelled job is taken up again."""

    fresh: bool = Field(False, description="From the start, instead of from the last checkpoint.")


class ResolvedVector(Answer):
    """A vector in a job's specification: pinned when the job was accepted."""

    reference: str
    version_id: UUID
    fingerprint: str


class ResolvedDataset(Answer):
    reference: str
    dataset_id: UUID
    fingerprint: str


class ResolvedInitialization(Answer):
    reference: str
    initialization_id: UUID
    fingerprint: str


class Center(Answer):
    """The mean of a reference pool when the job was accepted."""

    vector: list[float]  #: (d,), float32
    size: int  #: vectors of the pool
    rule: str  #: which vectors these were


class JobSpec(Answer):
    """The resolved specification: versions and fingerprints, never aliases. Enough to repeat the job."""

    method: str
    options: dict[str, Any]  #: complete, preset and defaults filled in
    preset: str | None = None
    output: str | None
    base_model: BaseModelReference
    base_model_facts: BaseModelFacts | None = None  #: what the registry knows of it; a worker checks it
    initialization: ResolvedInitialization | None = None
    dataset: ResolvedDataset | None = None
    datasets: list[ResolvedDataset] = Field(default_factory=list)  #: further ones
    target: ResolvedVector | None = None  #: None until the target's own job has ended
    target_name: str | None = None  #: None: a method that starts from no vector of the target's
    sources: list[ResolvedVector] = Field(default_factory=list)
    unmade_sources: dict[str, int] = Field(
        default_factory=dict
    )  #: names and places of those that other jobs make first
    center: Center | None = None  #: with the option `center`
    shots: int | None = None
    shot_seed: int = 0
    seed: int = 0
    task_type: str | None = None
    description: str | None = None
    tags: dict[str, str] = Field(default_factory=dict)


class Progress(Answer):
    """Where a running job is; from its newest events."""

    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    metric: str | None = None
    value: float | None = None
    group: list[str] | None = None
    group_changes: int | None = None  #: of the run so far, in whatever attempts
    samples_per_second: float | None = None  #: over the last half minute or so, validations included
    eta: float | None = None  #: seconds from `at` to the last step, at this speed
    at: datetime | None = None  #: of the step, by the worker's clock


class Attempt(Answer):
    number: int
    worker: str
    state: Literal["running", "succeeded", "failed", "superseded"]
    reason: str | None
    message: str | None
    started_at: datetime
    finished_at: datetime | None


class Artifact(Answer):
    """The result of a method whose tensors compare with nothing, as one safetensors file."""

    digest: str
    size: int  #: bytes


class NeededJob(Answer):
    """A job that another one waits for."""

    id: UUID
    method: str
    output: str | None
    state: State
    reason: str | None
    message: str | None


class Job(Answer):
    id: UUID
    method: str
    state: State
    reason: str | None  #: machine-readable; a member of `Reason`
    message: str | None  #: a sentence
    spec: JobSpec
    output: str | None
    needs: list[UUID]  #: jobs that must succeed first
    needed: list[NeededJob] = Field(default_factory=list)  #: the same, and how they stand
    queue: str
    priority: int
    min_memory: int | None = None  #: bytes, of the worker's device
    progress: Progress
    attempts: list[Attempt]
    result: str | None  #: reference of what it produced or matched: `ns/name:3`, or an initialization's id
    result_created: bool | None  #: False: the same content was registered already
    artifact: Artifact | None = None
    #: Of the finished job, e.g. {"validation/accuracy": 0.9, "target_steps": 80, "cpu_seconds": 12}; figures of further
    #: data sets begin with the data set's reference.
    metrics: dict[str, float]
    #: The figures of `metrics` that the job has measured first, with their predictions; those of a version that was
    #: there already may be an earlier job's.
    evaluations: list[Evaluation] = Field(default_factory=list)
    provenance: dict[str, Any] | None = None  #: how an artifact or figures came to be; a version has its own
    actor: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


class EventReport(Request):
    """One event of an attempt; `type` and the members it carries:

    - `progress`: step, steps, loss; `evaluation`: step, metric, value, split; `group`: step, members (references);
    - `log`: message; `warning`: message; `phase`: message (loading the data, tuning, verifying).
    """

    type: Literal["progress", "evaluation", "group", "log", "warning", "phase"]
    at: datetime
    data: dict[str, Any] = Field(default_factory=dict)


class Event(Answer):
    """An event as it is followed; `id` grows. The service itself writes those of two more types:

    `state`: state, reason, message; `checkpoint`: step, size in bytes.
    """

    id: int
    attempt: int | None
    type: str
    at: datetime
    data: dict[str, Any]


class EventPage(Answer):
    """Events after the one asked for; `next_after` continues, and `finished` says that no more will come."""

    items: list[Event]
    next_after: int
    finished: bool


class AttemptStart(Request):
    """A worker takes a job from the queue."""

    worker: str = Field(max_length=256)
    entry: int = Field(description="Of the queue, by which the job came; one that has been replaced is refused.")


class Checkpoint(Answer):
    """The state of an attempt's training after a step, as one stored file."""

    attempt: int
    step: int
    digest: str
    size: int  #: bytes


class AttemptStarted(Answer):
    """What the worker is to do. Reports carry `number`; those of a superseded attempt are refused (409)."""

    job: UUID
    number: int
    spec: JobSpec
    checkpoints: list[Checkpoint] = Field(default_factory=list)  #: newest first; the first intact one is gone on from


class EventsReport(Request):
    events: list[EventReport] = Field(max_length=1000)


class FailureReport(Request):
    reason: Reason
    message: str = Field(max_length=10_000)


class Staged(Answer):
    """A file that an attempt has stored and not yet committed."""

    digest: str
    size: int


class EvaluationReport(EvaluationCreate):
    predictions: str | None = Field(None, description="Digest of a staged JSONL file.")


class ResultReport(Request):
    """The one committing call of an attempt: result, evaluations, lineage and `succeeded`.

    What the result is follows from the method: `prompt` for a vector or an initialization, `artifact`, or neither.
    """

    prompt: str | None = Field(
        None, description="Digest of the staged safetensors file with the tensor `prompt` (r, d)."
    )
    artifact: str | None = Field(None, description="Digest of the staged safetensors file with the method's tensors.")
    state: str | None = Field(None, description="Digest of a staged file with the method's own tensors.")
    evaluations: list[EvaluationReport] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    base_model_facts: BaseModelFacts = Field(default_factory=BaseModelFacts)
