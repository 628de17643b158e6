"""Whether one set of predictions is better than another: accuracies, the majority class, and a paired interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Rows = Sequence[Mapping[str, Any]]  #: `{"prediction": ..., "target": ...}`, one for each row of the split, in order


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference of accuracies, and the ends of its 95 % interval."""

    difference: float
    low: float
    high: float


def correct(rows: Rows) -> NDArray[np.bool_]:
    """Which rows were answered right."""
    return np.array([str(row["prediction"]).strip() == str(row["target"]).strip() for row in rows], dtype=bool)


def majority(answers: Sequence[str], targets: Sequence[str]) -> float:
    """The accuracy of always giving the most frequent of `answers` (the first one on ties) on `targets`."""
    [(most, _)] = Counter(answer.strip() for answer in answers).most_common(1)
    return sum(target.strip() == most for target in targets) / len(targets)


def paired_bootstrap(rows: Rows, base: Rows, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The accuracy of `rows` minus that of `base` on the same examples, with the 95 % percentile interval.

    Examples are drawn with replacement, both answers to an example together, so what both find easy cancels out
    (Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation). The same seed gives the same
    interval. Raises ValueError when the two were not measured on the same examples.
    """
    if [row["target"] for row in rows] != [row["target"] for row in base]:
        raise ValueError("the predictions belong to different rows")
    if not rows:
        raise ValueError("there are no predictions")
    gain = correct(rows).astype(np.int64) - correct(base)
    # Only how often each of the gains -1, 0 and 1 is drawn matters.
    counts = np.array([(gain == value).sum() for value in (-1, 0, 1)])
    drawn = np.random.default_rng(seed).multinomial(len(gain), counts / len(gain), size=resamples)
    means = (drawn[:, 2] - drawn[:, 0]) / len(gain)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(difference=float(gain.mean()), low=float(low), high=float(high))
