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
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor

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
from tpv.schemas.initializations import BaseModelFacts
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
from tpv_worker import initialization, memory, parallel
from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.base_model import LoadedModel, check_facts
from tpv_worker.checkpoints import Checkpoints, Drained, StoredCheckpoints
from tpv_worker.data import Dataset, Task, few_shot, read_rows
from tpv_worker.errors import DISK_ERRORS, JobError, VerificationFailed
from tpv_worker.evaluation import evaluate, majority
from tpv_worker.events import Events, Untold
from tpv_worker.figures import Figure, Judged, check_figures, metrics_of
from tpv_worker.methods import METHODS, Given, TuningMethod
from tpv_worker.parallel import ALONE, Place, Separated
from tpv_worker.settings import Settings
from tpv_worker.training import TrainingResult, train
from tpv_worker.worker import TRY_AGAIN

PARTING = 30.0  #: seconds that a process waits to be ended, with the one that has more to tell of the failure
PATIENT = Retries(times=60, longest=10.0)  #: about ten minutes: hours of training are worth the wait for a store
THREADS = torch.get_num_threads()  #: what torch thinks right for one process of this machine


def threads_of(settings: Settings) -> int:
    """Of torch, in an attempt: a share of the cores, for with more threads than cores all wait for each other."""
    at_a_time = (settings.concurrency or 1) * settings.processes
    return settings.threads or max(1, THREADS // at_a_time)


def run_attempt(settings: Settings, started: AttemptStarted, model: LoadedModel, place: Place = ALONE) -> None:
    """Does the work and reports how it ended; exits with TRY_AGAIN when it cannot report.

    Of several processes the first one reports. Another one speaks only when it has failed, and exits with 1 then.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the worker, which ends this process when it must
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_worker, daemon=True).start()
    torch.set_num_threads(threads_of(settings))
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
                if place.rank:
                    traceback.print_exc()  # its events are not told
                if place.rank or isinstance(error, Separated):
                    # The first one tells what came before a failure of all, the one that has failed alone tells why.
                    time.sleep(PARTING)
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
        if self.place.rank and self.spec.method == "initialize":  # no other device is needed
            return None
        backbone, facts = model.get()
        check_facts(self.spec.base_model, expected=self.spec.base_model_facts, found=facts)
        # What P_init is drawn from, and weights that are trained themselves, are not rounded.
        exact = self.spec.method in ("initialize", "full")
        backbone.place(self.settings.device, "float32" if exact else self.spec.options.get("precision", "auto"))
        if self.spec.method == "initialize":
            return self.initialize(backbone, facts)
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


def summary(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Float32]:
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}


def _end_with_worker() -> None:
    worker = parent_process()
    if worker is not None:
        worker.join()
        os._exit(1)
