"""The task prompt vector as a value: T = P* - P_init, its checks and its arithmetic. No I/O but files of one vector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpv import files
from tpv.errors import IncompatibleVectors, InvalidTensor

if TYPE_CHECKING:
    from tpv.peft import TaskType

Float32 = NDArray[np.float32]


def as_prompt(values: ArrayLike, what: str = "tensor") -> Float32:
    """A finite, read-only float32 array (r, d) of values of any float type; raises InvalidTensor otherwise."""
    array = np.asarray(values)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise InvalidTensor(f"the {what} is {array.dtype}; a prompt is made of floats")
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidTensor(f"the {what} has shape {list(array.shape)}; a prompt is (num_virtual_tokens, token_dim)")
    with np.errstate(over="ignore"):
        prompt = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(prompt).all():
        bad = int((~np.isfinite(prompt)).sum())
        raise InvalidTensor(f"the {what} has {bad} of {prompt.size} values that are NaN or infinite as float32")
    prompt.flags.writeable = False
    return prompt


@dataclass(frozen=True, eq=False)
class TaskPromptVector:
    """What tuning changed in a soft prompt: float32 (r, d), tied to one initialization.

    Sums and differences (Eq. 3 and 4 of Task Prompt Vectors, https://arxiv.org/abs/2408.01119) need one common
    initialization and raise IncompatibleVectors otherwise; a scaled or negated vector keeps its own.

    >>> T = TaskPromptVector(np.ones((2, 3)), initialization="sha256:" + "0" * 64)
    >>> (2 * T - T).norm == T.norm
    True
    """

    tensor: Float32  #: (r, d), read-only
    initialization: str  #: the fingerprint of P_init

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", as_prompt(self.tensor, "vector"))
        if not self.initialization.startswith("sha256:"):
            raise InvalidTensor("a vector is tied to its initialization by a fingerprint: sha256:...")

    @classmethod
    def from_prompt(cls, prompt: ArrayLike, initialization: ArrayLike) -> TaskPromptVector:
        """T = P* - P_init (Eq. 2 of Task Prompt Vectors), both of shape (r, d)."""
        tuned, start = as_prompt(prompt, "prompt"), as_prompt(initialization, "initialization")
        if tuned.shape != start.shape:
            raise IncompatibleVectors(
                f"the prompt is {list(tuned.shape)}, its initialization {list(start.shape)}",
                differences={"shape": [list(tuned.shape), list(start.shape)]},
            )
        return cls(tuned - start, files.fingerprint(start))

    def apply(
        self, initialization: ArrayLike, scale: float = 1.0, *, allow_mixed_initializations: bool = False
    ) -> Float32:
        """The soft prompt P_init + scale * T (r, d).

        Raises IncompatibleVectors when the initialization is not the vector's own, unless that is asked for, and
        whenever the shapes differ.
        """
        start = as_prompt(initialization, "initialization")
        found = files.fingerprint(start)
        if found != self.initialization and not allow_mixed_initializations:
            raise _incompatible(
                self.initialization, found, "with allow_mixed_initializations it is applied to another all the same"
            )
        if start.shape != self.tensor.shape:
            raise IncompatibleVectors(
                f"the vector is {list(self.tensor.shape)}, the initialization {list(start.shape)}",
                differences={"shape": [list(self.tensor.shape), list(start.shape)]},
            )
        return as_prompt(start + np.float32(scale) * self.tensor, "prompt")

    @property
    def fingerprint(self) -> str:
        """`sha256:...` of the tensor: equal tensors have one fingerprint."""
        return files.fingerprint(self.tensor)

    @property
    def norm(self) -> float:
        """The Euclidean norm over all r * d weights."""
        return float(np.linalg.norm(self.tensor.astype(np.float64)))

    @property
    def pooled(self) -> Float32:
        """The mean over the token rows, (d,)."""
        return np.asarray(self.tensor.mean(axis=0))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the tensor `vector` and the initialization's fingerprint in its metadata."""
        Path(path).write_bytes(files.dump({"vector": self.tensor}, {"initialization": self.initialization}))

    @classmethod
    def load(cls, path: str | Path) -> TaskPromptVector:
        """Reads what `save` wrote; raises InvalidTensor for another file."""
        content = Path(path).read_bytes()
        tensors, metadata = files.load(content), files.metadata(content)
        if set(tensors) != {"vector"} or "initialization" not in metadata:
            raise InvalidTensor(
                f"{path}: no saved vector: it needs one tensor `vector` and its initialization's fingerprint"
            )
        return cls(tensors["vector"], metadata["initialization"])

    def to_peft(
        self,
        directory: str | Path,
        initialization: ArrayLike,
        *,
        base_model: str,
        task_type: TaskType,
        revision: str | None = None,
        scale: float = 1.0,
        reference: str | None = None,
        allow_mixed_initializations: bool = False,
    ) -> Path:
        """Writes P_init + scale * T as a directory that Hugging Face's `peft` loads: see `tpv.peft.write`."""
        from tpv import peft  # pydantic and httpx are loaded only when something is written

        return peft.write(
            directory,
            self,
            initialization,
            base_model=base_model,
            task_type=task_type,
            revision=revision,
            scale=scale,
            reference=reference,
            allow_mixed_initializations=allow_mixed_initializations,
        )

    def __add__(self, other: TaskPromptVector) -> TaskPromptVector:
        if not isinstance(other, TaskPromptVector):
            return NotImplemented
        self._check_fits(other)
        return TaskPromptVector(self.tensor + other.tensor, self.initialization)

    def __sub__(self, other: TaskPromptVector) -> TaskPromptVector:
        if not isinstance(other, TaskPromptVector):
            return NotImplemented
        self._check_fits(other)
        return TaskPromptVector(self.tensor - other.tensor, self.initialization)

    __array_ufunc__ = None  #: an array on the left gives way, and is refused, instead of taking vectors as its elements

    def __mul__(self, factor: float) -> TaskPromptVector:
        if not isinstance(factor, int | float | np.floating | np.integer):
            return NotImplemented
        return TaskPromptVector(self.tensor * np.float32(factor), self.initialization)

    __rmul__ = __mul__

    def __neg__(self) -> TaskPromptVector:
        return TaskPromptVector(-self.tensor, self.initialization)

    def __radd__(self, other: Any) -> TaskPromptVector:
        return self if other == 0 else NotImplemented  # sum([...]) begins with 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TaskPromptVector)
            and self.initialization == other.initialization
            and np.array_equal(self.tensor, other.tensor)
        )

    def __hash__(self) -> int:
        return hash((files.fingerprint(self.tensor + 0.0), self.initialization))  # -0.0 and 0.0 are equal

    def __repr__(self) -> str:
        rows, width = self.tensor.shape
        return f"TaskPromptVector({rows} x {width}, norm {self.norm:.4g}, initialization {self.initialization[:15]}...)"

    def _check_fits(self, other: TaskPromptVector) -> None:
        if self.initialization != other.initialization:
            raise _incompatible(
                self.initialization, other.initialization, "only vectors of one initialization are added"
            )
        if self.tensor.shape != other.tensor.shape:
            raise IncompatibleVectors(
                f"one vector is {list(self.tensor.shape)}, the other {list(other.tensor.shape)}",
                differences={"shape": [list(self.tensor.shape), list(other.tensor.shape)]},
            )


def _incompatible(one: str, other: str, advice: str) -> IncompatibleVectors:
    return IncompatibleVectors(
        f"one belongs to initialization {one[:19]}..., the other is {other[:19]}...; {advice}",
        differences={"initialization": [one, other]},
    )
