"""One attempt at a job, from the specification to the reported result; runs in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

import tpv
from tpv import Client, Retries, files
from tpv.errors import ConnectionFailed, JobFinished, ProblemError, StaleAttempt, Unavailable
from tpv.methods import InitializeOptions, TrainingOptions, options_of
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.jobs import (
    AttemptStarted,
    EvaluationReport,
    FailureReport,
    JobSpec,
    Reason,
    ResolvedVector,
    ResultReport,
)
from tpv.vectors import Float32
from tpv_worker import initialization, lab
from tpv_worker.backbone import Backbone, model_digest
from tpv_worker.data import Dataset, Row, Task, few_shot, read_rows
from tpv_worker.errors import JobError, ModelError
from tpv_worker.evaluation import Evaluation, evaluate, majority
from tpv_worker.events import Events
from tpv_worker.methods import METHODS, Given
from tpv_worker.settings import Settings
from tpv_worker.training import TrainingResult, train
from tpv_worker.worker import TRY_AGAIN

TOLERANCE = 0.01  #: share of rows that rounding may turn


class VerificationFailed(JobError):
    """The stored result does not do what the training process saw."""

    reason = "verification"


PATIENT = Retries(times=60, longest=10.0)  #: about ten minutes: hours of training are worth the wait for a store


def run_attempt(settings: Settings, started: AttemptStarted) -> None:
    """Does the work and reports how it ended; exits with TRY_AGAIN when it cannot report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the worker, which ends this process when it must
    threading.Thread(target=_end_with_worker, daemon=True).start()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if settings.threads:
        torch.set_num_threads(settings.threads)
    token = settings.token.get_secret_value() if settings.token else None
    with Client(settings.url, token, retries=PATIENT) as client:
        events = Events(client, started)
        try:
            try:
                result = Attempt(client, started, settings, events).run()
                events.flush()
                client.jobs.complete(started.job, started.number, result)
            except (StaleAttempt, JobFinished, ConnectionFailed, Unavailable):
                raise
            except Exception as error:
                failure = failure_of(error)
                if failure.reason == "crashed":
                    events.log("".join(traceback.format_exception(error)[-5:]))
                events.flush()
                client.jobs.fail(started.job, started.number, failure)
        except (StaleAttempt, JobFinished):
            return  # somebody else has the job, or nobody wants it any more
        except (ConnectionFailed, Unavailable):
            traceback.print_exc()
            os._exit(TRY_AGAIN)


def failure_of(error: Exception) -> FailureReport:
    """The reason that a user sees, and a sentence."""
    reason: Reason
    match error:
        case JobError():
            reason = cast("Reason", error.reason)
        case MemoryError() | torch.OutOfMemoryError():
            reason = "out-of-memory"
        case ProblemError():  # the registry does not give what the job was promised, or does not take the result
            reason = "conflict"
        case _:
            reason = "crashed"
    text = " ".join(str(error).split())[:1000]
    return FailureReport(reason=reason, message=f"{type(error).__name__}: {text}" if reason == "crashed" else text)


@dataclass(frozen=True)
class Attempt:
    """What the steps of an attempt share."""

    client: Client
    started: AttemptStarted
    settings: Settings
    events: Events

    @property
    def spec(self) -> JobSpec:
        return self.started.spec

    def run(self) -> ResultReport:
        """The result, verified, and everything it is made of staged."""
        self.events.phase("loading the model")
        where = locate_model(self.spec.base_model, self.settings.model_directories)
        backbone = Backbone.load(where, revision=self.spec.base_model.revision, device=self.settings.device)
        facts = facts_of(backbone, where, self.spec.base_model.revision)
        check_facts(self.spec.base_model, expected=self.spec.base_model_facts, found=facts)
        if self.spec.method == "initialize":
            return self.initialize(backbone, facts)
        return self.tune(backbone, facts)

    def initialize(self, backbone: Backbone, facts: BaseModelFacts) -> ResultReport:
        self.events.phase("drawing the initialization")
        options = cast("InitializeOptions", options_of(self.spec.method, self.spec.options))
        drawn = initialization.draw(options, self.spec.seed, backbone.embeddings, backbone.tokenizer)
        digest, _ = self.stage_and_load(drawn)
        return ResultReport(prompt=digest, base_model_facts=facts, provenance=self.provenance())

    def tune(self, backbone: Backbone, facts: BaseModelFacts) -> ResultReport:
        spec = self.spec
        options = cast("TrainingOptions", options_of(spec.method, spec.options))

        self.events.phase("loading the data")
        dataset = self.load_dataset()
        rows = dataset.splits["train"]
        train_rows = few_shot(rows, spec.shots, spec.shot_seed) if spec.shots else rows
        start = self.load_initialization().to(backbone.device)
        vectors: dict[str, Any] = {}
        if spec.target is not None:
            vectors["target"] = self.load_vector(spec.target).to(backbone.device)
            vectors["sources"] = torch.stack([self.load_vector(source) for source in spec.sources]).to(backbone.device)

        self.events.phase("tuning")
        method = METHODS[spec.method](
            options, Given(backbone=backbone, initialization=start, seed=spec.seed, **vectors)
        )
        task = Task(train=train_rows, validation=dataset.splits.get("validation", ()), label_words=dataset.label_words)
        result = train(
            backbone,
            method,
            [task],
            options=options,
            seed=spec.seed,
            report=self.report_training,
        )

        self.events.phase("verifying")
        assert isinstance(result.snapshot.prompt, Tensor)
        digest, staged = self.stage_and_load(result.snapshot.prompt)
        judged = [split for split in ("validation", "test") if split in dataset.splits]

        # P_init + T is what everybody reads who takes the vector from the registry.
        read = start + (torch.from_numpy(staged).to(start.device) - start)
        figures = {split: self.evaluate(backbone, read, dataset, split, options) for split in judged}
        if result.best_value is not None:
            validation = dataset.splits["validation"][: options.evaluate_rows]
            check_figure(result.best_value, figures["validation"].predictions[: len(validation)], validation)

        return ResultReport(
            prompt=digest,
            state=self.stage(files.dump(as_arrays(kept))) if (kept := result.snapshot.tensors) else None,
            evaluations=[self.report_of(split, figures[split], dataset.splits[split]) for split in judged],
            metrics=metrics_of(
                result, figures, {split: majority(train_rows, dataset.splits[split]) for split in judged}
            ),
            provenance=self.provenance() | self.provenance_of(result),
            base_model_facts=facts,
        )

    @staticmethod
    def evaluate(
        backbone: Backbone, prompt: Tensor, dataset: Dataset, split: str, options: TrainingOptions
    ) -> Evaluation:
        examples = backbone.tokenize(dataset.splits[split], options, len(prompt))
        return evaluate(backbone, prompt, examples, label_words=dataset.label_words, options=options)

    # --- What comes in

    def load_dataset(self) -> Dataset:
        """The job's rows; a split that this machine has had before is not downloaded again."""
        assert self.spec.dataset is not None
        dataset = self.client.datasets.get(self.spec.dataset.reference)
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

    def stage_and_load(self, prompt: Tensor) -> tuple[str, Float32]:
        """Stages a soft prompt, and gives what came back of it: its digest and the same tensor."""
        digest = self.stage(files.dump(as_arrays({"prompt": prompt})))
        loaded = files.load(self.client.jobs.staged(self.started.job, self.started.number, digest))["prompt"]
        if not np.array_equal(loaded, prompt.cpu().numpy()):
            raise VerificationFailed("the stored prompt is not the one that was sent")
        return digest, loaded

    def report_training(self, event: dict[str, Any]) -> None:
        """An event of the training loop, with the names of the sources instead of their places."""
        members = {"members": self.names(event["members"])} if "members" in event else {}
        split = {"split": "validation"} if event["type"] == "evaluation" else {}
        self.events.add(**{**event, **members, **split})

    def report_of(self, split: str, figure: Evaluation, rows: Sequence[Row]) -> EvaluationReport:
        assert self.spec.dataset is not None
        lines = [
            {"prediction": prediction, "target": row.target}
            for prediction, row in zip(figure.predictions, rows, strict=True)
        ]
        return EvaluationReport(
            dataset=self.spec.dataset.reference,
            split=split,
            metric=figure.metric,
            value=figure.value,
            seed=self.spec.seed,
            n=figure.n,
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
            "threads": torch.get_num_threads(),
            "worker": self.settings.name,
        }

    def provenance_of(self, result: TrainingResult) -> dict[str, Any]:
        """How the training went; for methods that group, who was in the group, and how much each vector counted."""
        found: dict[str, Any] = {
            "stage": 1 if self.spec.target is None else 2,  # of Algorithm 1: the task's own tuning, then with sources
            "best_step": result.best_step,
            "validations": result.validations,
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


def check_figure(trained: float, predictions: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises VerificationFailed when the stored result is not as good as the training process found it.

    The stored bytes are the trained ones; what may differ is the rounding of P_init + T, and on a GPU the order of
    sums. Either may turn a row that is a tie between two labels, so a hundredth of the rows, at least one, may differ.
    """
    right = sum(prediction == row.target.strip() for prediction, row in zip(predictions, rows, strict=True))
    off = abs(right - trained * len(rows))
    if off > max(1.0, TOLERANCE * len(rows)) + 1e-6:
        raise VerificationFailed(
            f"read back from the registry, the result answers {right} of {len(rows)} validation rows right; "
            f"the training process found {trained * len(rows):.0f}"
        )


def metrics_of(
    result: TrainingResult, figures: Mapping[str, Evaluation], baselines: Mapping[str, Evaluation]
) -> dict[str, float]:
    metrics: dict[str, float] = {
        "target_steps": result.steps,
        "best_step": result.best_step,
        **({} if result.loss is None else {"loss": result.loss}),
        "wall_seconds": result.wall_seconds,
        "cpu_seconds": result.cpu_seconds,
    }
    metrics |= {f"{split}/{figure.metric}": figure.value for split, figure in figures.items()}
    metrics |= {f"{split}/majority": baseline.value for split, baseline in baselines.items()}
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
