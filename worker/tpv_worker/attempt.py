"""One attempt at a job, from the specification to the reported result; runs in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

import tpv
from tpv import Client, Retries, files
from tpv.errors import (
    ConnectionFailed,
    DamagedContent,
    Forbidden,
    JobFinished,
    ProblemError,
    StaleAttempt,
    TpvError,
    Unauthorized,
)
from tpv.methods import METHODS as DECLARED
from tpv.methods import InitializeOptions, TrainingOptions, options_of
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.jobs import (
    AttemptStarted,
    EvaluationReport,
    FailureReport,
    JobSpec,
    Reason,
    ResolvedDataset,
    ResolvedVector,
    ResultReport,
)
from tpv.vectors import Float32
from tpv_worker import initialization, lab, memory, parallel
from tpv_worker.backbone import Backbone, Prompt, model_digest
from tpv_worker.checkpoints import Checkpoints, Drained, StoredCheckpoints
from tpv_worker.data import Dataset, Example, Row, Task, few_shot, read_rows
from tpv_worker.errors import DISK_ERRORS, JobError, ModelError
from tpv_worker.evaluation import Evaluation, evaluate, majority
from tpv_worker.events import Events, Untold
from tpv_worker.methods import METHODS, Given, TuningMethod
from tpv_worker.parallel import ALONE, Place, Separated
from tpv_worker.settings import Settings
from tpv_worker.training import TrainingResult, train
from tpv_worker.worker import TRY_AGAIN

TOLERANCE = 0.01  #: share of rows that rounding may turn


class VerificationFailed(JobError):
    """The stored result does not do what the training process saw."""

    reason = "verification"


PARTING = 30.0  #: seconds to be ended in, when the processes of an attempt have lost each other
FIRST = 5.0  #: seconds that the first process has to tell the same failure, with what came before it
PATIENT = Retries(times=60, longest=10.0)  #: about ten minutes: hours of training are worth the wait for a store


THREADS = torch.get_num_threads()  #: what torch thinks right here


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


def run_attempt(settings: Settings, started: AttemptStarted, model: LoadedModel, place: Place = ALONE) -> None:
    """Does the work and reports how it ended; exits with TRY_AGAIN when it cannot report.

    Of several processes the first one reports. Another one speaks only when it has failed, and exits with 1 then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the worker, which ends this process when it must
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_worker, daemon=True).start()
    torch.set_num_threads(settings.threads or THREADS)
    token = settings.token.get_secret_value() if settings.token else None
    with Client(settings.url, token, retries=PATIENT) as client:
        events = Untold() if place.rank else Events(client, started)
        events.listen()
        try:
            try:
                memory.limit(settings)
                result = Attempt(client, started, settings, events, stopping, place).run(model)
                events.flush()
                if result is not None:
                    client.jobs.complete(started.job, started.number, result)
            except (StaleAttempt, JobFinished, ConnectionFailed):
                raise
            except Exception as error:
                if isinstance(error, Separated):  # the one that has failed says why, and the host ends the others
                    time.sleep(PARTING)
                elif place.rank:
                    traceback.print_exc()  # its events are not told
                    time.sleep(FIRST)
                failure = failure_of(error)
                if failure.reason == "crashed":
                    events.log("".join(traceback.format_exception(error)[-5:]))
                try:
                    events.flush()
                except ProblemError:  # how it ended is worth more than what was seen on the way
                    traceback.print_exc()
                client.jobs.fail(started.job, started.number, failure)
                if place.rank:
                    os._exit(1)
        except (StaleAttempt, JobFinished):  # somebody else has the job, or nobody wants it any more
            if place.rank:  # its work is not done: the first one, which may wait for it, is to end too
                os._exit(1)
        except TpvError as error:
            if failure_of(error).reason != "unavailable":  # the report itself is wrong
                raise
            traceback.print_exc()
            os._exit(TRY_AGAIN)


def failure_of(error: Exception) -> FailureReport:
    """The reason that a user sees, and a sentence."""
    reason: Reason
    text = " ".join(str(error).split())[:1000]
    match error:
        case JobError():
            reason = cast("Reason", error.reason)
        case Drained():
            reason = "drained"
        case Unauthorized() | Forbidden():  # the worker's token is not valid any more
            reason = "unavailable"
        case ConnectionFailed():
            reason = "unavailable"
        case Separated():
            reason = "killed"
        case ProblemError() if error.status >= 500 and not isinstance(error, DamagedContent):
            reason = "unavailable"  # for longer than is waited for: the service, or the store or database behind it
        case OSError() if error.errno in DISK_ERRORS:  # this machine's disk, for caches
            reason = "unavailable"
        case _ if memory.has_run_out(error):
            reason = "out-of-memory"
        case RuntimeError() if isinstance(error, torch.AcceleratorError) or text.startswith("CUDA error"):
            reason, text = "unavailable", f"the device failed: {text}"
        case ProblemError():  # the registry does not give what the job was promised, or does not take the result
            reason = "conflict"
        case _:
            reason = "crashed"
    return FailureReport(reason=reason, message=f"{type(error).__name__}: {text}" if reason == "crashed" else text)


@dataclass(frozen=True)
class Attempt:
    """What the steps of an attempt share."""

    client: Client
    started: AttemptStarted
    settings: Settings
    events: Events
    stopping: threading.Event  #: set when the worker wants the attempt to end after a step
    place: Place  #: of this process among those of the attempt

    @property
    def spec(self) -> JobSpec:
        return self.started.spec

    def run(self, model: LoadedModel) -> ResultReport | None:
        """The result, verified, and everything it is made of staged; the first process has it."""
        backbone, facts = model.get()
        check_facts(self.spec.base_model, expected=self.spec.base_model_facts, found=facts)
        # What P_init is drawn from, and weights that are trained themselves, are not rounded.
        exact = self.spec.method in ("initialize", "full")
        backbone.place(self.settings.device, "float32" if exact else self.spec.options.get("precision", "auto"))
        if self.spec.method == "initialize":
            return None if self.place.rank else self.initialize(backbone, facts)
        return self.tune(backbone, facts)

    def initialize(self, backbone: Backbone, facts: BaseModelFacts) -> ResultReport:
        self.events.phase("drawing the initialization")
        options = cast("InitializeOptions", options_of(self.spec.method, self.spec.options))
        drawn = initialization.draw(options, self.spec.seed, backbone.embeddings, backbone.tokenizer)
        digest, _ = self.stage_and_load({"prompt": drawn})
        return ResultReport(prompt=digest, base_model_facts=facts, provenance=self.provenance())

    def tune(self, backbone: Backbone, facts: BaseModelFacts) -> ResultReport | None:
        spec = self.spec
        options = cast("TrainingOptions", options_of(spec.method, spec.options))
        assert spec.dataset is not None

        self.events.phase("loading the data")
        together = DECLARED[spec.method].datasets == "together"
        trained = [spec.dataset, *(spec.datasets if together else ())]
        datasets = [self.load_dataset(resolved) for resolved in trained]
        tasks = [self.task_of(dataset, spec.shots) for dataset in datasets]
        of_sources = [self.task_of(self.load_dataset(d), None) for d in (() if together else spec.datasets)]
        given = self.load_given(backbone, len(tasks))

        method = METHODS[spec.method](options, given)
        length = backbone.num_virtual_tokens(method.snapshot().prompt)
        judged = [
            Judged(
                dataset=resolved.reference,
                split=split,
                rows=rows,
                examples=backbone.tokenize(rows, options, length, place),  # what does not fit is found before training
                label_words=task.label_words,
                majority=majority(task.train, rows).value,
            )
            for place, (resolved, dataset, task) in enumerate(zip(trained, datasets, tasks, strict=True))
            for split in ("validation", "test")
            if (rows := dataset.splits.get(split))
        ]

        checkpoints = Checkpoints() if self.place.rank else self.stored_checkpoints()
        self.events.phase("tuning")
        with parallel.together(self.place, self.settings.device):
            checkpoints.found = parallel.of_first(checkpoints.found)
            result = train(
                backbone,
                method,
                tasks,
                of_sources,
                options=options,
                seed=spec.seed,
                report=self.report_training,
                checkpoints=checkpoints,
            )
        if self.place.rank:
            return None

        self.events.phase("verifying")
        prompt, stored = self.store(method, result, given)
        figures = [
            Figure(of, evaluate(backbone, prompt, of.examples, label_words=of.label_words, options=options))
            for of in judged
        ]
        if result.best_value is not None:
            check_figures(result.best_value, figures, options.evaluate_rows)
        return ResultReport(
            **stored,
            evaluations=[self.report_of(figure) for figure in figures],
            metrics=metrics_of(result, figures, spec.dataset.reference),
            provenance=self.provenance() | self.provenance_of(result, method),
            base_model_facts=facts,
        )

    def stored_checkpoints(self) -> StoredCheckpoints:
        return StoredCheckpoints(self.client, self.started, self.events, self.settings.checkpoint_every, self.stopping)

    def store(self, method: TuningMethod, result: TrainingResult, given: Given) -> tuple[Prompt, dict[str, str]]:
        """Stages the result, and gives the prompt that it is when read back, with the digests to report."""
        tensors = result.snapshot.tensors
        match DECLARED[self.spec.method].result:
            case "artifact":
                digest, loaded = self.stage_and_load(tensors, {"method": self.spec.method})
                method.load({name: torch.from_numpy(array).to(given.initialization) for name, array in loaded.items()})
                return method.snapshot().prompt, {"artifact": digest}
            case "metrics":
                return method.snapshot().prompt, {}
        assert isinstance(result.snapshot.prompt, Tensor)  # the result is a vector
        digest, loaded = self.stage_and_load({"prompt": result.snapshot.prompt})
        # P_init + T is what everybody reads who takes the vector from the registry.
        start = given.initialization
        prompt = start + (torch.from_numpy(loaded["prompt"]).to(start) - start)
        state = {"state": self.stage(files.dump(as_arrays(tensors)))} if tensors else {}
        return prompt, {"prompt": digest, **state}

    # --- What comes in

    def load_given(self, backbone: Backbone, tasks: int) -> Given:
        """The vectors of the job, on the model's device."""
        spec, device = self.spec, backbone.device
        sources = [self.load_vector(source) for source in spec.sources]
        return Given(
            backbone=backbone,
            initialization=self.load_initialization().to(device),
            target=self.load_vector(spec.target).to(device) if spec.target else None,
            sources=torch.stack(sources).to(device) if sources else None,
            source_names=self.names(range(len(sources))),
            center=torch.tensor(spec.center.vector, device=device) if spec.center else None,
            tasks=tasks,
            seed=spec.seed,
        )

    def task_of(self, dataset: Dataset, shots: int | None) -> Task:
        rows = dataset.splits["train"]
        return Task(
            train=few_shot(rows, shots, self.spec.shot_seed) if shots else rows,
            validation=dataset.splits.get("validation", ()),
            label_words=dataset.label_words,
        )

    def load_dataset(self, resolved: ResolvedDataset) -> Dataset:
        """A data set's rows; a split that this machine has had before is not downloaded again."""
        dataset = self.client.datasets.get(resolved.reference)
        cache = self.settings.data_cache
        cache.mkdir(parents=True, exist_ok=True)
        splits = {}
        for split in dataset.splits:
            path = cache / f"{split.fingerprint.removeprefix('sha256:')}.jsonl"
            if not path.exists() or files.digest(path.read_bytes()) != split.fingerprint:
                self.client.datasets.download(dataset, split.name, path)
            splits[split.name] = read_rows(path)
        words = tuple(dataset.label_words) if dataset.label_words else None
        return Dataset(splits=splits, label_words=words, fingerprint=dataset.fingerprint)

    def load_initialization(self) -> Tensor:
        assert self.spec.initialization is not None
        return torch.from_numpy(
            self.client.initializations.load(str(self.spec.initialization.initialization_id)).copy()
        )

    def load_vector(self, vector: ResolvedVector) -> Tensor:
        loaded = self.client.vectors.get(vector.reference).load()
        if loaded.fingerprint != vector.fingerprint:
            raise VerificationFailed(f"{vector.reference} is not the vector that the job was given")
        return torch.from_numpy(loaded.tensor.copy())

    # --- What goes out

    def stage(self, content: bytes) -> str:
        return self.client.jobs.stage(self.started.job, self.started.number, content).digest

    def stage_and_load(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, Float32]]:
        """Stages tensors as one file, and gives what came back of it: its digest and the same tensors."""
        arrays = as_arrays(tensors)
        digest = self.stage(files.dump(arrays, metadata))
        loaded = files.load(self.client.jobs.staged(self.started.job, self.started.number, digest))
        if loaded.keys() != arrays.keys() or not all(np.array_equal(loaded[name], arrays[name]) for name in arrays):
            raise VerificationFailed("what was stored is not what was sent")
        return digest, loaded

    def report_training(self, event: dict[str, Any]) -> None:
        """An event of the training loop, with the names of the sources instead of their places."""
        members = {"members": self.names(event["members"])} if "members" in event else {}
        split = {"split": "validation"} if event["type"] == "evaluation" else {}
        self.events.add(**{**event, **members, **split})

    def report_of(self, figure: Figure) -> EvaluationReport:
        of, found = figure.of, figure.found
        lines = [
            {"prediction": prediction, "target": row.target}
            for prediction, row in zip(found.predictions, of.rows, strict=True)
        ]
        return EvaluationReport(
            dataset=of.dataset,
            split=of.split,
            metric=found.metric,
            value=found.value,
            seed=self.spec.seed,
            n=found.n,
            predictions=self.stage(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)),
        )

    def provenance(self) -> dict[str, Any]:
        return {
            "libraries": {
                "tpv-registry": tpv.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
            },
            "device": self.settings.device,
            "processes": self.place.size,
            "threads": torch.get_num_threads(),
            "worker": self.settings.name,
        }

    def provenance_of(self, result: TrainingResult, method: TuningMethod) -> dict[str, Any]:
        """How the training went; for methods that group, who was in the group, and how much each vector counted."""
        found: dict[str, Any] = {
            "stage": 1 if self.spec.target is None else 2,  # of Algorithm 1: the task's own tuning, then with sources
            "best_step": result.best_step,
            "validations": result.validations,
            "facts": dict(method.facts),
        }
        if result.snapshot.members is not None:
            found["group"] = self.names(result.snapshot.members)
            found["group_history"] = [{"step": step, "members": self.names(group)} for step, group in result.groups]
        if "source_scales" in result.snapshot.tensors:
            scales = zip(
                self.names(range(len(self.spec.sources))), result.snapshot.tensors["source_scales"], strict=True
            )
            found["scales"] = {name: summary(scale) for name, scale in scales}
            found["target_scale"] = summary(result.snapshot.tensors["target_scale"])
        return found

    def names(self, members: Sequence[int]) -> list[str]:
        return [self.spec.sources[i].reference for i in members]


# --- The base model --------------------------------------------------------------------------------------------------


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


# --- Figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Rows that the result is judged by: a split of a data set that was trained on."""

    dataset: str
    split: str
    rows: Sequence[Row]
    examples: Sequence[Example]
    label_words: tuple[str, ...] | None
    majority: float  #: accuracy of the training rows' most frequent target


@dataclass(frozen=True)
class Figure:
    """What the result reaches on such rows."""

    of: Judged
    found: Evaluation

    def right(self, first: int | None) -> float:
        """The share of the first rows, or of all, that is answered right."""
        pairs = list(zip(self.found.predictions, self.of.rows, strict=True))[:first]
        return fmean(prediction == row.target.strip() for prediction, row in pairs)


def check_figures(trained: float, figures: Sequence[Figure], first: int | None) -> None:
    """Raises VerificationFailed when the stored result is not as good as the training process found it.

    Compared are the means over the tasks, on the `first` validation rows of each. The stored bytes are the trained
    ones; what may differ is the rounding of P_init + T, and on a GPU the order of sums. Either may turn a row that is
    a tie between two labels, so a hundredth of a task's rows, at least one, may differ.
    """
    read = [figure for figure in figures if figure.of.split == "validation"]
    value = fmean(figure.right(first) for figure in read)
    sizes = [len(figure.of.rows[:first]) for figure in read]
    if abs(value - trained) > fmean(max(1 / size, TOLERANCE) for size in sizes) + 1e-6:
        raise VerificationFailed(
            f"read back from the registry, the result answers {value:.2%} of {sum(sizes)} validation rows right; the "
            f"training process found {trained:.2%}"
        )


def metrics_of(result: TrainingResult, figures: Sequence[Figure], first: str) -> dict[str, float]:
    """The job's metrics; figures of data sets beside the first one carry its name."""
    metrics: dict[str, float] = {
        "target_steps": result.steps,
        "best_step": result.best_step,
        **({} if result.loss is None else {"loss": result.loss}),
        "wall_seconds": result.wall_seconds,
        "cpu_seconds": result.cpu_seconds,
    }
    for figure in figures:
        of = figure.of
        name = of.split if of.dataset == first else f"{of.dataset}/{of.split}"
        metrics |= {f"{name}/{figure.found.metric}": figure.found.value, f"{name}/majority": of.majority}
    return metrics


def summary(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Float32]:
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}


def _end_with_worker() -> None:
    worker = parent_process()
    if worker is not None:
        worker.join()
        os._exit(1)
