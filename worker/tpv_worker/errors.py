"""The faults of a job itself, each with the machine-readable reason that its `failed` state carries.

Whatever is not one of these is a fault of the machine or of this program; trying again may help there, never here.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from tpv.errors import TpvError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  #: of the machine's disk; no fault of a job


class JobError(TpvError):
    """The job cannot succeed, as it was asked for or now; `reason` is stable, the message says what to change."""

    reason: ClassVar[str] = "internal"


class DataError(JobError):
    """The rows are missing, malformed, or do not fit the limits of the options."""

    reason = "data"


class OptionsError(JobError):
    """The options do not fit the model or the data."""

    reason = "options"


class ModelError(JobError):
    """The base model cannot be loaded, or is of a kind that takes no soft prompt here."""

    reason = "model"


class HubUnavailable(JobError):
    """The model hub does not answer; the job may succeed when it does."""

    reason = "unavailable"


class TrainingDiverged(JobError):
    """The loss or the soft prompt became NaN or infinite; `step` is the first such step seen, counted from 1."""

    reason = "nan-loss"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training diverged: the {what} is no finite number at step {step}; lower the learning rate")
        self.step = step


class OutOfMemory(JobError):
    """Not even one row at a time fits the memory; `tokens` are those of the longest row of that step."""

    reason = "out-of-memory"

    def __init__(self, step: int, tokens: int) -> None:
        super().__init__(
            f"out of memory at step {step}: not even one row (of up to {tokens} tokens, and the soft prompt) fits; "
            "lower max_source_tokens, or ask for a worker with more memory (min_memory)"
        )
        self.step, self.tokens = step, tokens


class VerificationFailed(JobError):
    """The stored result does not do what the training process saw."""

    reason = "verification"
