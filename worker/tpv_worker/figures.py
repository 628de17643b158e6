"""What a result reaches on the rows that it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tpv_worker.data import Example, Row
from tpv_worker.errors import VerificationFailed
from tpv_worker.evaluation import Evaluation
from tpv_worker.training import TrainingResult

TOLERANCE = 0.01  #: share of rows that rounding may turn


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
