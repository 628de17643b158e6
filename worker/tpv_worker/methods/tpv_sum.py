"""Task prompt vector arithmetic: prompt tuning that starts from the sum of the sources' vectors.

Belanec et al. 2024, Task Prompt Vectors: Effective Initialization through Multi-Task Soft-Prompt Transfer,
https://arxiv.org/abs/2408.01119. Eq. 3 and 4:

    P = P_init + scale * sum over the sources of T_s

The paper has 0 < scale <= 1 and takes the scale that is best on validation rows, of the tasks whose vectors are added
(appendix A): it asks what the sum knows of them. Here a target starts from the sum, so its own validation rows decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import nn

from tpv.methods import TpvSumOptions
from tpv_worker.checkpoints import Checkpoints
from tpv_worker.data import Task
from tpv_worker.errors import OptionsError
from tpv_worker.evaluation import evaluate
from tpv_worker.methods.prompt_tuning import PromptTuning
from tpv_worker.methods.protocol import Given, Report


class TpvSum(PromptTuning):
    """Trains P from the sum: r * d parameters. With `steps` 0 the sum itself is the result (zero-shot)."""

    def __init__(self, options: TpvSumOptions, given: Given) -> None:
        super().__init__(options, given)
        assert given.sources is not None
        self.backbone, self.scales = given.backbone, options.scales
        self.P_init, self.sum = given.initialization, given.sources.sum(dim=0)
        self.start_from(self.scales[0])

    def start_from(self, scale: float) -> None:
        self.P = nn.Parameter(self.P_init + scale * self.sum)
        self.facts = {"scale": scale}

    def prepare(
        self, tasks: Sequence[Task], source_tasks: Sequence[Task], report: Report, checkpoints: Checkpoints
    ) -> None:
        """Chooses the scale of the best validation value, the first one on ties; a single scale is taken as it is.

        Raises OptionsError for several scales without validation rows.
        """
        if len(self.scales) == 1:
            return
        judged = [
            (task, self.backbone.tokenize(task.validation[: self.options.evaluate_rows], self.options, len(self.P), i))
            for i, task in enumerate(tasks)
            if task.validation
        ]
        if not judged:
            raise OptionsError("one of several scales is chosen on validation rows, and the data have none: say one")
        values = []
        for scale in self.scales:
            self.start_from(scale)
            value = fmean(
                evaluate(
                    self.backbone, self.P.detach(), examples, label_words=task.label_words, options=self.options
                ).value
                for task, examples in judged
            )
            report({"type": "evaluation", "step": 0, "metric": "accuracy", "value": value, "scale": scale})
            values.append(value)
        self.start_from(self.scales[values.index(max(values))])
        self.facts = {**self.facts, "scales": self.scales, "values": values}
