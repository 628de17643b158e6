"""Every error of the registry, defined once: the service raises it, problem+json carries it, the client re-raises it.

TpvError
├── ProblemError            what the service answers; `type`, `status`, `title` are stable
│   ├── NotFound            404: a named thing is not there
│   ├── Conflict            409: it is there, but not as the request wants it
│   │   ├── VersionConflict, IncompatibleVectors, AliasMoved, InUse, IdempotencyConflict, StaleAttempt, JobFinished,
│   │   ├── NotNow
│   ├── Invalid             422: the request itself is wrong
│   │   ├── InvalidReference, InvalidTensor, InvalidDataset, InvalidOptions, FingerprintMismatch
│   ├── TooLarge            413
│   ├── Unauthorized        401
│   ├── Forbidden           403
│   ├── DamagedContent      500: a stored blob does not match its digest
│   └── Unavailable         503: the database or the blob store does not answer
├── ConnectionFailed        the service could not be reached
├── JobFailed               a job that was waited for did not succeed
├── WaitTimeout             it did not finish in time
└── NotInstalled            a library of an extra is needed and not there
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class TpvError(Exception):
    """The base of all errors that this project raises on purpose."""


class ProblemError(TpvError):
    """The service could not do what was asked.

    `detail` says what is wrong, where, and what to do; `extra` holds members beyond RFC 9457's own
    (`differences`, `errors`, `reference` ...).
    """

    status: int = 500
    type: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something went wrong inside the service"

    def __init__(self, detail: str = "", **extra: Any) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.extra = extra

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 document of this error."""
        return {
            **self.extra,
            "type": f"urn:tpv:problem:{self.type}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }


class NotFound(ProblemError):
    """What the request names is not there."""

    status = 404
    type = "not-found"
    title = "Not found"


class Conflict(ProblemError):
    """The request collides with what is there."""

    status = 409
    type = "conflict"
    title = "Conflict"


class VersionConflict(Conflict):
    """The same content is registered already with other metadata, or was deleted."""

    type = "version-conflict"
    title = "The version exists with other metadata"


class IncompatibleVectors(Conflict):
    """Vectors of different initializations were to be compared or combined."""

    type = "incompatible-vectors"
    title = "The vectors do not belong together"


class AliasMoved(Conflict):
    """The alias points to another version than the one expected."""

    type = "alias-moved"
    title = "The alias points elsewhere"


class InUse(Conflict):
    """Something still points to what was to be deleted."""

    type = "in-use"
    title = "Still in use"


class IdempotencyConflict(Conflict):
    """The idempotency key was used for another request."""

    type = "idempotency-conflict"
    title = "The idempotency key belongs to another request"


class StaleAttempt(Conflict):
    """A report of an attempt that is not the job's current one."""

    type = "stale-attempt"
    title = "The attempt was superseded"


class JobFinished(Conflict):
    """The job has ended; it cannot change any more."""

    type = "job-finished"
    title = "The job has ended"


class NotNow(Conflict):
    """The job may not start on this worker, or not yet; the service hands it out again."""

    type = "not-now"
    title = "The job cannot start now"


class Invalid(ProblemError):
    """The request is wrong in itself."""

    status = 422
    type = "invalid-request"
    title = "The request is not valid"


class InvalidReference(Invalid):
    """A name, version, alias or fingerprint is not written as it should be."""

    type = "invalid-reference"
    title = "The reference is not valid"


class InvalidTensor(Invalid):
    """An uploaded file is no prompt or vector of the stated initialization."""

    type = "invalid-tensor"
    title = "The tensor is not valid"


class InvalidDataset(Invalid):
    """An uploaded file is not JSON Lines with `source` and `target`."""

    type = "invalid-dataset"
    title = "The data set is not valid"


class InvalidOptions(Invalid):
    """The options do not fit the method."""

    type = "invalid-options"
    title = "The options are not valid"


class FingerprintMismatch(Invalid):
    """What arrived is not what the request declared."""

    type = "fingerprint-mismatch"
    title = "The fingerprint does not match"


class TooLarge(ProblemError):
    """The request's body is larger than the service takes."""

    status = 413
    type = "too-large"
    title = "The body is too large"


class Unauthorized(ProblemError):
    """No valid token came with the request."""

    status = 401
    type = "unauthorized"
    title = "A valid token is needed"


class Forbidden(ProblemError):
    """The token lacks the scope that the request needs."""

    status = 403
    type = "forbidden"
    title = "The token may not do this"


class DamagedContent(ProblemError):
    """A stored blob does not match its digest; it is not served."""

    status = 500
    type = "damaged-content"
    title = "The stored content is damaged"


class Unavailable(ProblemError):
    """The database or the blob store does not answer; try again."""

    status = 503
    type = "unavailable"
    title = "A part of the service is not available"


class ConnectionFailed(TpvError):
    """The service could not be reached."""


class JobFailed(TpvError):
    """A job that was waited for ended `failed` or `cancelled`; `job` is its last state."""

    def __init__(self, message: str, job: Any) -> None:
        super().__init__(message)
        self.job = job


class WaitTimeout(TpvError):
    """The job did not finish within the time that the caller gave."""


class NotInstalled(TpvError):
    """A library that a base installation does not have is needed; the message names the extra that brings it."""


def _leaves(cls: type[ProblemError]) -> list[type[ProblemError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


PROBLEMS: Mapping[str, type[ProblemError]] = {cls.type: cls for cls in _leaves(ProblemError)}


def from_problem(document: Mapping[str, Any], status: int) -> ProblemError:
    """The error that a problem+json document describes; of an unknown type, by its status."""
    members = dict(document)
    name = str(members.pop("type", "")).removeprefix("urn:tpv:problem:")
    detail = str(members.pop("detail", "") or members.pop("title", "") or f"HTTP status {status}")
    members.pop("title", None), members.pop("status", None)
    by_status = {
        cls.status: cls for cls in (NotFound, Conflict, Invalid, TooLarge, Unauthorized, Forbidden, Unavailable)
    }
    error = PROBLEMS.get(name, by_status.get(status, ProblemError))(detail, **members)
    error.status = status
    return error
